"""Blocks that are listed whatever their scores are."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from visattn.given import counted
from visattn.keep import kept
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.geometry import Bools

TERM = re.compile(r"(self)|(near|first)\((\d+)\)|window\((\d+(?:x\d+)*)\)")
ORDER = ("self", "near", "first", "window")


@dataclass(frozen=True)
class Term:
    """One rule: its name, and one number or one per axis."""

    name: str
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({'x'.join(map(str, self.sizes))})" if self.sizes else self.name


def terms_of(text: object) -> tuple[Term, ...]:
    """The rules of a text like "self+first(1)", in one order.

    Raises:
        ValueError: If there is no such rule.
    """
    if text is None:
        return ()
    found: set[Term] = set()
    for part in text.split("+") if isinstance(text, str) else [""]:
        match = TERM.fullmatch(part.strip())
        if not match:
            raise ValueError(
                f"always={text!r} must be none, or of self, near(1), first(1) and window(3x3x3) joined by +"
            )
        sizes = match[3] or match[4]
        term = Term(part.strip().split("(")[0], tuple(int(n) for n in sizes.split("x")) if sizes else ())
        if term.name == "first" and not term.sizes[0]:
            raise ValueError(f"always={text!r}: first(0) lists nothing, leave it out")
        if term.name == "window" and any(n % 2 == 0 for n in term.sizes):
            raise ValueError(f"always={text!r}: a window is odd, so that it has a middle; it is in blocks")
        found.add(term)
    return tuple(sorted(found, key=lambda t: (ORDER.index(t.name), t.sizes)))


@kept
def always_mask(terms: tuple[Term, ...], blocks: Blocks) -> Bools:
    """Which key blocks each query block always lists: bool [rows, columns]."""
    mask = np.zeros((blocks.rows, blocks.columns), bool)
    for term in terms:
        mask |= _term_mask(term, blocks)
    return mask


def _term_mask(term: Term, blocks: Blocks) -> Bools:
    dims = len(blocks.grid)
    if term.name == "first":
        first = np.arange(blocks.columns) // (blocks.columns // blocks.key_shape[0]) < term.sizes[0]
        return np.broadcast_to(first, (blocks.rows, blocks.columns))
    sizes = term.sizes or (0,)
    if term.name == "window":
        sizes = tuple(n // 2 for n in sizes)
    reach = sizes * dims if len(sizes) == 1 else sizes
    if len(reach) != dims:
        sides, axes = counted(len(reach), "side"), counted(dims, "axis", "axes")
        raise ValueError(f"always={term} has {sides} but the blocks have {axes}: give {dims} or 1")
    mask = np.ones((1, 1), bool)
    for n, rows, columns, far in zip(blocks.grid, blocks.queries, blocks.keys, reach, strict=True):
        # Blocks of keys that touch the query's block, and `far` blocks of queries further on either side.
        start = np.arange(0, n, rows)
        low, high = start - far * rows, start + (far + 1) * rows
        first = np.arange(0, n, columns)
        mask = np.kron(mask, (first[None] < high[:, None]) & (first[None] + columns > low[:, None]))
    return mask


@kept
def always_on(terms: tuple[Term, ...], blocks: Blocks, device: torch.device) -> torch.Tensor | None:
    """The mask on a device, None where nothing is forced; copied there once, not in every call."""
    mask = always_mask(terms, blocks)
    return torch.from_numpy(mask).to(device) if mask.any() else None
