"""MALA: linear attention whose weights keep the magnitude of the query."""

from __future__ import annotations

import torch

from visattn.kernels.linear.features import elu_plus_one
from visattn.operands import repeated, widened

EPSILON = 1e-6


def mala_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    rotated: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Magnitude-aware linear attention on features.

    z_i = scale f(q_i) . mean_j f(k_j), and the weight of key j for query i is

        (scale / N) r(q_i) . r(k_j) (1 + 1 / (z_i + 1e-6)) - z_i / N

    with N keys; the weights of a query sum to 1 where r is f. Source: Fan et al., "Rectifying Magnitude Neglect in
    Linear Attention" (ICCV 2025), section 3 (beta = 1 + 1 / z and gamma = z / N there), and its released code for the
    order of scale, mean and rotation.

    Args:
        q: Features f(q) of the queries [B, S, H, D], positive (`mala_features`).
        k: Features f(k) of the keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        scale: Factor on products of features, D**-0.5 if None.
        key_mask: bool [B, S], True where a key may be attended; others count in no mean and no N.
        rotated: Features with rotary position embedding r(q) [B, S, H, D] and r(k) [B, S, Hkv, D] for the product;
            None for q and k. z is always of q and k.

    Returns:
        [B, S, H, D] in v's dtype; zeros for a sample without any key. Computed in float32 at least.
    """
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k, values = widened(q), repeated(widened(k), q.shape[2]), repeated(widened(v), q.shape[2])
    rotated_q, rotated_k = (
        (q, k) if rotated is None else (widened(rotated[0]), repeated(widened(rotated[1]), q.shape[2]))
    )
    count: torch.Tensor | int = k.shape[1]
    if key_mask is not None:
        shown = key_mask[:, :, None, None].to(k.dtype)
        k, values = k * shown, values * shown
        count = key_mask.sum(1).clamp(min=1)[:, None, None, None].to(k.dtype)
    z = scale * (q * (k.sum(1, keepdim=True) / count)).sum(-1, keepdim=True)
    state = torch.einsum("bshf,bshd->bhfd", rotated_k, values)
    product = torch.einsum("bshf,bhfd->bshd", rotated_q, state) * scale / count
    out = product * (1 + 1 / (z + EPSILON)) - z * (values.sum(1, keepdim=True) / count)
    return out.to(v.dtype)


def mala_weights(q: torch.Tensor, k: torch.Tensor, scale: float, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The weights that `mala_attention` gives the values: features [B, R, H, D], [B, S, Hkv, D] -> [B, H, R, S]."""
    k = repeated(k, q.shape[2])
    count: torch.Tensor | int = k.shape[1]
    shown: torch.Tensor | float = 1.0
    if key_mask is not None:
        k = k * key_mask[:, :, None, None].to(k.dtype)
        count = key_mask.sum(1).clamp(min=1)[:, None, None, None].to(k.dtype)
        shown = key_mask[:, None, None].to(k.dtype)
    products = torch.einsum("brhd,bshd->bhrs", q, k) * scale / count
    z = products.sum(-1, keepdim=True)
    return products * (1 + 1 / (z + EPSILON)) - z / count * shown


mala_features = elu_plus_one
