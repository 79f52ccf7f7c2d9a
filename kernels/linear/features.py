"""Feature maps of linear attention: positive functions of queries and keys whose product stands for the softmax's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn.operands import repeated, widened


def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """ELU(x) + 1 in float32 at least (Katharopoulos et al. 2020, equation 7).

    As exp(x) below 0: adding 1 to ELU would round small values away.
    """
    x = widened(x)
    return torch.where(x > 0, x + 1, _at_most_zero(x).exp())


def feature_map(x: torch.Tensor, feature: str) -> torch.Tensor:
    """Features without parameters in float32 at least: "elu", "relu", or x where it is features already ("given")."""
    return elu_plus_one(x) if feature == "elu" else widened(x).relu() if feature == "relu" else widened(x)


def features(
    q: torch.Tensor,
    k: torch.Tensor,
    feature: str,
    parameters: Mapping[str, torch.Tensor],
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries and keys, in float32 at least.

    Attention divides by their sums, so factors per query and per head, and those that cancel in the product, are
    free: they are chosen so that the largest product is about 1 and nothing over- or underflows.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        feature: One of `visattn.patterns.linear.FEATURES`.
        parameters: `query_map` and `key_map` [H, D, D] of the learnable ones; missing ones are the identity.
        key_mask: bool [B, S]; features of hidden keys are zero.

    Returns:
        Features [B, S, H, F] and [B, S, Hkv or H, F]; F is D, or 2 D for the learnable ones.
    """
    if feature in ("elu", "relu"):
        q, k = feature_map(q, feature), feature_map(k, feature)
        k = _shown(k, key_mask)
        return q / peak(q, (3,)), k / peak(k, (1, 3))
    maps = parameters.get("query_map"), parameters.get("key_map")
    if maps[1] is not None:
        k = repeated(k, q.shape[2])
    q, k = (_mapped(x, weight) for x, weight in zip((q, k), maps, strict=True))
    if feature == "hedgehog":
        return _softmax_pair(q), _shown(_softmax_pair(k), key_mask)
    assert feature == "exp", feature
    q, k = torch.cat([q, -q], -1), torch.cat([k, -k], -1)
    seen = k.detach() if key_mask is None else k.detach().masked_fill(~key_mask[:, :, None, None], float("-inf"))
    top = seen.amax(1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)
    q = q + repeated(top, q.shape[2])
    # Hidden keys may be larger than the largest visible one.
    return (q - q.detach().amax(-1, keepdim=True)).exp(), _shown(_at_most_zero(k - top).exp(), key_mask)


def _at_most_zero(x: torch.Tensor) -> torch.Tensor:
    """min(x, 0) whose gradient at 0 is 1; that of clamp is 0 or 1, depending on torch's version."""
    return x.masked_fill(x > 0, 0)


def peak(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest value over some axes, 1 where all are zero."""
    top = x.detach().amax(dims, keepdim=True)
    return top.masked_fill(top == 0, 1)


def _shown(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    return x if key_mask is None else x * key_mask[:, :, None, None].to(x.dtype)


def _mapped(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, S, H, D] times a matrix [H, D, D] per head."""
    x = widened(x)
    return x if weight is None else torch.einsum("bshd,hde->bshe", x, weight.to(x.dtype))


def _softmax_pair(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
