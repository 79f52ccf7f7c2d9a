"""Linear attention by sums over all keys, in torch's operators."""

from __future__ import annotations

import torch

from visattn.kernels.linear.features import features
from visattn.operands import repeated, widened


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q_i . sum_j k_j v_j / (q_i . sum_j k_j) of features that are at least 0.

    Args:
        q: Features of the queries [B, S, H, F], float32 at least.
        k: Features of the keys [B, N, Hkv or H, F]; zeros hide a key.
        v: Values [B, N, Hkv, D].

    Returns:
        [B, S, H, D] in v's dtype; zeros for a query whose features meet no key's.
    """
    values = repeated(widened(v), k.shape[2])
    state = torch.einsum("bshf,bshd->bhfd", k, values)
    grouped = q.unflatten(2, (k.shape[2], -1))
    total = torch.einsum("bsgef,bgf->bsge", grouped, k.sum(1))
    product = torch.einsum("bsgef,bgfd->bsged", grouped, state)
    return divided(product, total).flatten(2, 3).to(v.dtype)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature: str, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear attention of queries and keys under a feature map without parameters, or that are features ("given")."""
    if feature == "given":
        shown = widened(k) if key_mask is None else widened(k) * key_mask[:, :, None, None]
        return linear_attention(widened(q), shown, v)
    return linear_attention(*features(q, k, feature, {}, key_mask), v)


def divided(product: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Products [..., D] over their normaliser [...]; zeros where nothing was summed."""
    return product / total.masked_fill(total < torch.finfo(total.dtype).tiny, 1)[..., None]
