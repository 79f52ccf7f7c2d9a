"""What the mask of a diffusers model means for a pattern: valid keys, or a bias that queries and keys can carry."""

from __future__ import annotations

import torch

# Channels that carry a bias; two would do, but kernels like multiples of eight.
CARRIED = 8


def key_validity(
    mask: torch.Tensor | None, q: torch.Tensor, row: int | None, length: int | None = None
) -> torch.Tensor | str | None:
    """Which keys a mask of attention leaves valid, or a bias, or why the mask says more than that.

    Args:
        mask: What stock attention gets: broadcasts to [B, H, S, N], or [B, N]; True or 0 keeps a pair.
        q: Queries [B, S, H, D].
        row: Row of a full mask that holds the validity of the keys, None if there is no such row: then all are equal.
        length: Number of keys N, None for S.

    Returns:
        None for all keys; bool [B, N]; a float vector m [B, S] of zeros and ones if m[i] * m[j] is added to the
        logits; or a text.
    """
    if mask is None:
        return None
    length = q.shape[1] if length is None else length
    shape, full = list(mask.shape), _broadcast(mask, q, length)
    if isinstance(full, str):
        return full
    if not _is_constant(full, 1):
        return f"its mask {shape} differs from head to head"
    full = full[:, :1]
    rows = full.shape[2]
    if rows != 1 and row is None:
        if not _is_constant(full, 2):
            return f"its mask {shape} differs from query to query"
        full, rows = full[:, :, :1], 1
    keys = full[:, 0, 0 if rows == 1 or row is None else row]
    if keys.dtype != torch.bool:
        valid = keys == 0
        if not bool((valid | (keys < -1e3)).all()):
            if rows == 1 and bool((keys == keys[:, :1]).all()):
                # The same for every key, a bias changes nothing.
                return None
            if rows == length and bool((full[:, 0] == keys[:, :, None] * keys[:, None]).all()):
                return _bias(keys, shape, q)
            return f"its mask {shape} is a bias, not a mask of keys"
        keys = valid
    if keys.device.type == "cpu" and bool(keys.all()):
        return None
    return keys.expand(q.shape[0], -1)


def _broadcast(mask: torch.Tensor, q: torch.Tensor, length: int) -> torch.Tensor | str:
    """A mask with four axes, each of size 1 or that of [B, H, S, N] for N keys."""
    batch, tokens, heads = q.shape[:3]
    shape, text = list(mask.shape), f"its mask {list(mask.shape)} is not a mask of keys"
    if shape == [batch, length] and 1 < batch == tokens:
        return f"its mask {shape} can be one of each sample's keys or one of queries and keys"
    if shape == [batch, length]:
        # As diffusers' dispatcher reads it; torch would see a mask of queries and keys.
        mask = mask[:, None, None]
    if mask.ndim > 4 or mask.ndim < 1:
        return text
    mask = mask[(None,) * (4 - mask.ndim)]
    fits = all(n in (1, most) for n, most in zip(mask.shape, (batch, heads, tokens), strict=False))
    return mask if fits and mask.shape[3] == length else text


def _is_constant(mask: torch.Tensor, axis: int) -> bool:
    """Whether a mask is the same along an axis; looks at values only where memory does not tell."""
    if mask.shape[axis] == 1 or mask.stride(axis) == 0:
        return True
    return bool((mask == mask.narrow(axis, 0, 1)).all())


def _bias(keys: torch.Tensor, shape: list[int], q: torch.Tensor) -> torch.Tensor | str | None:
    if not bool(((keys == 0) | (keys == 1)).all()):
        return f"its mask {shape} is a bias, not a mask of keys"
    # The same for every key, a bias changes nothing.
    return None if bool((keys == 1).all()) else keys.expand(q.shape[0], -1)


def carry_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add m[i] * m[j] to the logits without a mask: further channels whose scaled product is that.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D]; zeros are appended.
        bias: The vector m [B, S].
        scale: Factor on the logits.

    Returns:
        q, k, v [B, S, ., D + CARRIED]; the output's further channels are zero.
    """
    m = bias.to(q.dtype)[:, :, None, None]
    # 1 / scale is rounded to q's dtype: a second channel carries the rest.
    whole = torch.tensor(1 / scale, dtype=q.dtype, device="cpu").item()
    factors = torch.tensor([whole, 1 / scale - whole, *[0.0] * (CARRIED - 2)], dtype=q.dtype, device=q.device)
    q = torch.cat([q, (m * factors).expand(*q.shape[:3], -1)], -1)
    ones = torch.tensor([1.0, 1.0, *[0.0] * (CARRIED - 2)], dtype=k.dtype, device=k.device)
    k = torch.cat([k, (m.to(k.dtype) * ones).expand(*k.shape[:3], -1)], -1)
    return q, k, torch.nn.functional.pad(v, (0, CARRIED))
