"""Where the tokens of a forward sit, as far as the forward tells: the rest follows from the length of a sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from visattn.layout import Layout

# "Whatever is left": a number of text tokens that only the sequence length tells.
REST = -1


class Sample(NamedTuple):
    """Where the tokens of one sample of a batch sit; what is left of the sequence follows the grid.

    Attributes:
        grid: Tokens per axis.
        prefix: Tokens before the grid.
    """

    grid: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True)
class Where:
    """Where the tokens of one forward sit; resolves the layout of a sequence from its length.

    Attributes:
        grid: Tokens per axis at full resolution.
        prefix: Tokens before the grid, or REST.
        suffix: Tokens after the grid, or REST.
        levels: How odd grids are halved, "ceil" or "floor"; "" if no halves occur.
        why: Why there is no grid, if there is none.
        samples: Where the tokens of each sample sit, where samples differ.
        early: Whether some layers attend before the tokens in front of the grid join.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    levels: str = ""
    why: str = ""
    samples: tuple[Sample, ...] = ()
    early: bool = False

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        if self.why or not self.samples:
            found = self.layout(length)
            return found if isinstance(found, str) else (found,)
        grids = {Layout(sample.grid) for sample in self.samples}
        if len(grids) == 1 and length == next(iter(grids)).tokens:
            # Layers before the text joins.
            return tuple(grids)
        rest = [length - sample.prefix - math.prod(sample.grid) for sample in self.samples]
        if min(rest) < 0:
            return f"a sequence of {length} tokens is not {self}"
        return tuple(Layout(s.grid, s.prefix, after) for s, after in zip(self.samples, rest, strict=True))

    def layout(self, length: int) -> Layout | str:
        """The layout of a sequence of `length` tokens, or why there is none."""
        if self.why or not self.grid:
            return self.why or "its forward does not tell where its tokens sit: pass layout=Layout(grid, ...)"
        if min(self.grid) < 1:
            return f"its grid {_times(self.grid)} is empty"
        for grid in self._grids():
            inner = Layout(grid)
            rest = length - inner.tokens - max(self.prefix, 0) - max(self.suffix, 0)
            if rest == 0 or (rest > 0 and REST in (self.prefix, self.suffix)):
                prefix = rest if self.prefix == REST else self.prefix
                suffix = rest if self.suffix == REST else self.suffix
                return Layout(grid, prefix, suffix)
            if length == inner.tokens:
                # Some layers of joint models attend among image tokens alone.
                return inner
            if self.early and self.suffix > 0 and length == inner.tokens + self.suffix:
                return Layout(grid, 0, self.suffix)
        return f"a sequence of {length} tokens is not {self}"

    def _grids(self) -> Iterator[tuple[int, ...]]:
        grid = self.grid
        yield grid
        while self.levels and max(grid) > 1:
            grid = tuple((n + (self.levels == "ceil")) // 2 for n in grid)
            if min(grid) < 1:
                return
            yield grid

    def __str__(self) -> str:
        if self.samples:
            return " or ".join(
                f"prefix {sample.prefix} + grid {_times(sample.grid)}" for sample in dict.fromkeys(self.samples)
            )
        parts = [f"grid {_times(self.grid)}" + " or halves of it" * bool(self.levels)]
        if self.prefix:
            parts.insert(0, "text" if self.prefix == REST else f"prefix {self.prefix}")
        if self.suffix:
            parts.append("text" if self.suffix == REST else f"suffix {self.suffix}")
        return " + ".join(parts)


@dataclass(frozen=True)
class Given:
    """Where the tokens of calls sit as somebody says: the first place whose sequences have the length of a call.

    Attributes:
        places: The places.
    """

    places: tuple[Where, ...]

    @classmethod
    def of(cls, layouts: Iterable[Layout]) -> Given:
        """The places of layouts."""
        return cls(tuple(Where(layout.grid, layout.prefix, layout.suffix) for layout in layouts))

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis of the first place."""
        return self.places[0].grid

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, or why there is none."""
        for place in self.places:
            found = place.layouts(length)
            if not isinstance(found, str):
                return found
        return f"a sequence of {length} tokens is not {self}"

    def __str__(self) -> str:
        return " or ".join(map(str, self.places))


def _times(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))
