"""How a sequence is cut over devices: each has a slab of the grid along one axis, and all dense tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visattn.given import said, several, tensor
from visattn.layout import Layout, check_layout
from visattn.patterns.values import whole_number


@dataclass(frozen=True)
class Slabs:
    """A layout whose grid is cut along one axis: rank r has `sizes[r]` consecutive rows, and all dense tokens.

    Attributes:
        layout: The whole sequence.
        axis: Which axis is cut, from 0.
        sizes: Rows of each rank, at least one each.

    Raises:
        ValueError: If the axis does not exist or the rows do not add up to it.
    """

    layout: Layout
    axis: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_layout(self.layout)
        if self.layout.key_layout is not None:
            raise ValueError(f"{self.layout} cannot be cut: slabs are of one sequence, whose queries are its keys")
        if not isinstance(self.axis, int) or isinstance(self.axis, bool) or not 0 <= self.axis < self.layout.dims:
            raise ValueError(f"axis={said(self.axis)} must be an axis of the grid: 0 to {self.layout.dims - 1}")
        object.__setattr__(
            self, "sizes", tuple(whole_number(n, "sizes", 1) for n in several(self.sizes, "sizes", "rows of each rank"))
        )
        if not self.sizes or min(self.sizes) < 1 or sum(self.sizes) != self.rows:
            raise ValueError(
                f"sizes={self.sizes} must be rows of each rank, at least 1 each and {self.rows} together (axis "
                f"{self.axis} of {self.layout}): call Slabs.even(layout, ranks, axis)"
            )

    @classmethod
    def even(cls, layout: Layout, ranks: int, axis: int = 0) -> Slabs:
        """Slabs whose rows differ by at most one, the first ones longer.

        Raises:
            ValueError: If the axis has fewer rows than there are ranks.
        """
        check_layout(layout)
        if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis < layout.dims:
            raise ValueError(f"axis={said(axis)} must be an axis of the grid: 0 to {layout.dims - 1}")
        rows, ranks = layout.grid[axis], whole_number(ranks, "ranks", 1)
        if not 1 <= ranks <= rows:
            raise ValueError(
                f"axis {axis} of {layout} has {rows} rows, and {ranks} ranks want at least one each: cut a longer axis"
            )
        return cls(layout, axis, tuple(rows // ranks + (r < rows % ranks) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        """Number of slabs."""
        return len(self.sizes)

    @property
    def rows(self) -> int:
        """Rows of the whole axis."""
        return self.layout.grid[self.axis]

    @property
    def row_tokens(self) -> int:
        """Grid tokens of a row."""
        return self.layout.tokens // self.rows

    @property
    def dense(self) -> int:
        """Dense tokens, which every rank has."""
        return self.layout.prefix + self.layout.suffix

    def start(self, rank: int) -> int:
        """First row of a rank."""
        return sum(self.sizes[: self.checked(rank)])

    def grid(self, rows: int) -> tuple[int, ...]:
        """The grid of so many rows."""
        rows = whole_number(rows, "rows", 1)
        return (*self.layout.grid[: self.axis], rows, *self.layout.grid[self.axis + 1 :])

    def local(self, rank: int) -> Layout:
        """Where the tokens of a rank sit: its slab, with the dense tokens around it."""
        return Layout(self.grid(self.sizes[self.checked(rank)]), self.layout.prefix, self.layout.suffix)

    def shard(self, x: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """A rank's tokens of a whole sequence: dense tokens and its slab, in the order of `local(rank)`.

        Args:
            x: The sequence, whose tokens are on axis `dim`.
            rank: Whose.
            dim: The axis of the tokens.
        """
        rank = self.checked(rank)
        if not 0 <= whole_number(dim, "dim", 0) < tensor(x, "x", "of a whole sequence").ndim:
            raise ValueError(f"dim={dim} is no axis of x {list(x.shape)}: pass that of its tokens")
        self.layout.check_length(x.shape[dim], f"axis dim={dim} of x")
        before, grid, after = x.split([self.layout.prefix, self.layout.tokens, self.layout.suffix], dim)
        own = self.unfold(grid, self.layout.grid, dim).narrow(dim + self.axis, self.start(rank), self.sizes[rank])
        own = own.flatten(dim, dim + self.layout.dims - 1)
        return torch.cat([before, own, after], dim) if self.dense else own

    def joined(self, parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The whole sequence of all ranks' tokens, the inverse of `shard`; dense tokens are the first rank's.

        Args:
            parts: Tokens of each rank.
            dim: The axis of the tokens.
        """
        dim = whole_number(dim, "dim", 0)
        parts = self._parts(parts, dim)
        slabs, ends = [], (parts[0].narrow(dim, 0, 0),) * 2
        for rank, part in enumerate(parts):
            local = self.local(rank)
            before, grid, after = part.split([local.prefix, local.tokens, local.suffix], dim)
            ends = (before, after) if rank == 0 else ends
            slabs.append(self.unfold(grid, local.grid, dim))
        whole = torch.cat(slabs, dim + self.axis).flatten(dim, dim + self.layout.dims - 1)
        return torch.cat([ends[0], whole, ends[1]], dim) if self.dense else whole

    def checked(self, rank: int) -> int:
        """A rank that there is."""
        if whole_number(rank, "rank", 0) >= self.ranks:
            raise ValueError(f"rank={rank} must be below {self.ranks}, the number of slabs")
        return int(rank)

    def _parts(self, parts: Sequence[torch.Tensor], dim: int) -> list[torch.Tensor]:
        """Parts that are those of all ranks."""
        given = several(parts, "parts", "tensors, the tokens of each rank")
        lengths = [self.local(rank).length for rank in range(self.ranks)]
        shapes = [tensor(part, "parts", "for each rank").shape for part in given]
        if [shape[dim] if dim < len(shape) else None for shape in shapes] != lengths:
            raise ValueError(
                f"parts {[list(shape) for shape in shapes]} must be {self.ranks} tensors with {lengths} tokens on "
                f"axis dim={dim}: what shard() gave"
            )
        return given

    @staticmethod
    def unfold(grid: torch.Tensor, sides: tuple[int, ...], dim: int = 1) -> torch.Tensor:
        """Grid tokens with their axes apart."""
        return grid.unflatten(dim, sides)


def check_slabs(slabs: object) -> None:
    """Raise a ValueError for what says not how a sequence is cut."""
    if not isinstance(slabs, Slabs):
        raise ValueError(f"slabs={said(slabs)} must be a Slabs: call Slabs.even(layout, ranks, axis)")


def best_axis(layout: Layout, ranks: int) -> int:
    """The axis whose slabs differ least in size and, of those, whose rows have fewest tokens (the smallest border).

    Raises:
        ValueError: If no axis has a row for every rank.
    """
    check_layout(layout)
    ranks = whole_number(ranks, "ranks", 1)
    axes = [axis for axis, rows in enumerate(layout.grid) if rows >= ranks]
    if not axes:
        raise ValueError(f"no axis of {layout} has {ranks} rows, one for each rank: use fewer ranks")
    # The largest slab's share of the work, in steps of two percent: what a border costs beyond that decides.
    waste = {a: round(50 * -(-layout.grid[a] // ranks) * ranks / layout.grid[a]) for a in axes}
    return min(axes, key=lambda a: (waste[a], layout.tokens // layout.grid[a], a))
