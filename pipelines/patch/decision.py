"""What a patched forward ran, in a form that its backward can carry."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch

from visattn.layout import Layout
from visattn.patterns import Pattern, parse
from visattn.pipelines.patch.stock import Stock

# Bytes of an encoded decision; a fixed size keeps the operator's shapes free of data.
DECISION_BYTES = 4096


class Cut(NamedTuple):
    """How processes shared the tokens of a call.

    Attributes:
        axis: The axis that is cut.
        sizes: Rows of each process.
        fetches: Whether keys are fetched (halo, ring), rather than tokens exchanged for heads (Ulysses).
        group: Name of the process group.
    """

    axis: int
    sizes: tuple[int, ...]
    fetches: bool
    group: str


class Decision(NamedTuple):
    """What a forward ran, in a form that its backward can carry.

    Attributes:
        layouts: Where the tokens sat, of each sample where they differ; empty if the stock attention ran.
        pattern: The pattern.
        backend: What the user asked for.
        mask_row: Row of a full mask that tells which keys are valid.
        stock: The attention without visattn.
        names: Names of the pattern's learnable parameters.
        cut: How processes shared the one layout, None if they did not.
    """

    layouts: tuple[Layout, ...]
    pattern: Pattern
    backend: str
    mask_row: int | None
    stock: Stock
    names: tuple[str, ...] = ()
    cut: Cut | None = None

    def encode(self) -> torch.Tensor:
        """As bytes on the CPU: [DECISION_BYTES]."""
        where = [_numbers(layout) for layout in self.layouts]
        data = json.dumps([where, str(self.pattern), self.backend, self.mask_row, self.names, self.cut, *self.stock])
        text = data.encode()
        assert len(text) <= DECISION_BYTES, f"decision of {len(text)} bytes"
        return torch.frombuffer(bytearray(text.ljust(DECISION_BYTES)), dtype=torch.uint8)

    @classmethod
    def decode(cls, data: torch.Tensor) -> Decision:
        """The inverse of `encode`."""
        where, pattern, backend, mask_row, names, cut, *stock = json.loads(bytes(data.numpy()))
        layouts = tuple(_layout(each) for each in where)
        shared = None if cut is None else Cut(cut[0], tuple(cut[1]), *cut[2:])
        return cls(layouts, parse(pattern), backend, mask_row, Stock(*stock), tuple(names), shared)


def _numbers(layout: Layout) -> list[Any]:
    """A layout as lists of numbers."""
    keys = layout.key_layout
    return [layout.grid, layout.prefix, layout.suffix, None if keys is None else _numbers(keys)]


def _layout(numbers: list[Any]) -> Layout:
    grid, prefix, suffix, keys = numbers
    return Layout(grid, prefix, suffix, None if keys is None else _layout(keys))
