"""Feature maps of linear attention: positive functions of queries and keys whose product stands for the softmax's."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def widened(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least, where sums over many tokens are safe."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """ELU(x) + 1 in float32 at least (Katharopoulos et al. 2020, equation 7).

    As exp(x) below 0: adding 1 to ELU would round small values away.
    """
    x = widened(x)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values [B, S, Hkv, D] for every query head: [B, S, H, D]."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def features(
    q: torch.Tensor, k: torch.Tensor, feature: str, parameters: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries and keys, in float32 at least.

    Their scale is free, as attention divides by their sums: those of "exp" are divided by the largest of a query,
    and by the largest of all keys of a head, so that nothing overflows.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        feature: One of `visattn.patterns.linear.FEATURES`.
        parameters: `query_map` and `key_map` [H, D, D] of the learnable ones; missing ones are the identity.

    Returns:
        Features [B, S, H, F] and [B, S, Hkv or H, F]; F is D, or 2 D for the learnable ones.
    """
    if feature == "elu":
        return elu_plus_one(q), elu_plus_one(k)
    if feature == "relu":
        return widened(q).relu(), widened(k).relu()
    maps = parameters.get("query_map"), parameters.get("key_map")
    if maps[1] is not None:
        k = repeated(k, q.shape[2])
    found = [_mapped(x, weight) for x, weight in zip((q, k), maps, strict=True)]
    if feature == "hedgehog":
        return _softmax_pair(found[0]), _softmax_pair(found[1])
    assert feature == "exp", feature
    q, k = (torch.cat([x, -x], -1) for x in found)
    q = (q - q.detach().amax(-1, keepdim=True)).exp()
    return q, (k - k.detach().amax((1, 3), keepdim=True)).exp()


def _mapped(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """X [B, S, H, D] times a matrix [H, D, D] per head."""
    x = widened(x)
    return x if weight is None else torch.einsum("bshd,hde->bshe", x, weight.to(x.dtype))


def _softmax_pair(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
