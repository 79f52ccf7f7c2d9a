"""Causal axes: which pairs of blocks have a pair of tokens of which one sees the other, and which tokens those are."""

from __future__ import annotations

import numpy as np
import torch

from visattn.keep import kept
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.geometry import Bools
from visattn.tiling import Ints


def check_causal(blocks: Blocks) -> None:
    """Raise a ValueError if blocks reach over several positions of a causal axis, which is not the only one."""
    for axis, (causal, query, key) in enumerate(zip(blocks.causal, blocks.queries, blocks.keys, strict=True)):
        if causal and max(query, key) > 1 and len(blocks.grid) > 1:
            raise ValueError(
                f"axis {axis} of {blocks.grid} is causal and blocks of {max(query, key)} tokens reach over it, so that "
                "what is listed would be seen in part: give blocks of one token along it, like block=1x8x8, or runs "
                "of the flat sequence, like block=64 with causal=true"
            )


@kept
def reachable(blocks: Blocks) -> Bools:
    """Which key blocks have a token that some token of a query block sees: bool [rows, columns]."""
    mask = np.ones((1, 1), bool)
    for n, rows, columns, causal in zip(blocks.grid, blocks.queries, blocks.keys, blocks.causal, strict=True):
        last = np.minimum(np.arange(0, n, rows) + rows, n) - 1
        first = np.arange(0, n, columns)
        own = first[None] <= last[:, None]
        mask = np.kron(mask, own if causal else np.ones_like(own))
    return mask


@kept
def reachable_on(blocks: Blocks, device: torch.device) -> torch.Tensor | None:
    """The same on a device, None where no axis is causal."""
    return torch.from_numpy(reachable(blocks)).to(device) if any(blocks.causal) else None


@kept
def reach_of(blocks: Blocks) -> Ints | None:
    """How many key blocks each query block may see: [rows]; None where those are not the first ones.

    They are where the first axis is the causal one.
    """
    reach = reachable(blocks)
    number = reach.sum(1)
    return number if (reach == (np.arange(blocks.columns) < number[:, None])).all() else None


@kept
def reach_on(blocks: Blocks, device: torch.device) -> torch.Tensor:
    """The same on a device: int32 [rows].

    Raises:
        ValueError: If they are others.
    """
    number = reach_of(blocks)
    if number is None:
        raise ValueError(f"what blocks of {blocks} may see does not begin with the first one")
    return torch.from_numpy(number.astype(np.int32)).to(device)


@kept
def pairs_on(blocks: Blocks, device: torch.device) -> torch.Tensor:
    """Pairs of tokens of which one sees the other, of each pair of blocks: float64 [rows, columns]."""
    pairs = np.ones((1, 1))
    for n, rows, columns, causal in zip(blocks.grid, blocks.queries, blocks.keys, blocks.causal, strict=True):
        start, first = np.arange(0, n, rows)[:, None], np.arange(0, n, columns)[None]
        stop, length = np.minimum(start + rows, n), np.minimum(columns, n - first)
        own = (stop - start) * length
        if causal:
            own = _up_to(stop - first, length) - _up_to(start - first, length)
        pairs = np.kron(pairs, own.astype(np.float64))
    return torch.from_numpy(pairs).to(device)


def _up_to(queries: Ints, length: Ints) -> Ints:
    """Keys of a block of so many that the queries from its first token on see, for so many queries in all."""
    inside = np.clip(queries, 0, length)
    return inside * (inside + 1) // 2 + np.maximum(queries - length, 0) * length


def seen_tokens(blocks: Blocks, device: torch.device, tokens: torch.Tensor | None = None) -> torch.Tensor | None:
    """Which tokens of the grid are not later than some others: bool [tokens, grid tokens]; None without causal axes.

    Args:
        blocks: The blocks.
        device: Where the answer goes.
        tokens: Of the grid; None for all.
    """
    if not any(blocks.causal):
        return None
    places = torch.from_numpy(_places(blocks)).to(device)
    own = places if tokens is None else places[:, tokens]
    return (places[:, None] <= own[:, :, None]).all(0)


@kept
def _places(blocks: Blocks) -> Ints:
    """Positions of each token on the causal axes: [axes, tokens]."""
    return np.indices(blocks.grid).reshape(len(blocks.grid), -1)[np.asarray(blocks.causal)]


def later_slots(queries: Ints, keys: Ints) -> Bools:
    """Which keys of a tile come after a query of another, where a line is causal; empty slots (-1) come after nothing.

    Args:
        queries: Tokens [..., T].
        keys: Tokens [..., slots].
    """
    return (keys[..., None, :] > queries[..., :, None]) & (queries >= 0)[..., None]
