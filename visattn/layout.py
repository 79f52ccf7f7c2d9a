"""Where the tokens of a sequence sit: a grid, with dense tokens before and after it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from visattn.given import said

# Engines count tokens in 32 bits.
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """A token sequence: `prefix` dense tokens, a row-major grid, `suffix` dense tokens.

    Dense tokens (class token, registers, text) attend to everything and are attended by everything;
    a pattern shapes attention inside the grid only.

    Attributes:
        grid: Tokens per axis: an int or (L,), (H, W) or (T, H, W).
        prefix: Dense tokens before the grid.
        suffix: Dense tokens after the grid.
        key_layout: Where keys and values sit if they are other tokens than the queries; None if they are the same. Both
            grids span the same extent, so that position i of n on an axis has its centre at (i + 0.5) / n of it.

    Raises:
        ValueError: If an axis is below 1, a count is negative, there are not 1 to 3 axes, or the keys have another
            number of axes.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    key_layout: Layout | None = None

    def __init__(
        self, grid: int | Sequence[int], prefix: int = 0, suffix: int = 0, key_layout: Layout | None = None
    ) -> None:
        # Neither sets nor the keys of a mapping are in an order.
        several = isinstance(grid, Iterable) and not isinstance(grid, Set | Mapping | str | bytes | bytearray)
        # A tensor of one number says that it can be iterated over.
        several = several and getattr(grid, "ndim", 1) > 0
        axes: tuple[Any, ...] = tuple(grid) if several else (grid,)  # type: ignore[arg-type]
        if not 1 <= len(axes) <= 3 or not all(_is_whole(n, 1) for n in axes):
            raise ValueError(
                f"grid {said(grid)} must be 1 to 3 whole numbers of at least 1 (and at most {LARGEST}), like 4096, "
                "(64, 64) or (8, 32, 32)"
            )
        if not _is_whole(prefix, 0) or not _is_whole(suffix, 0):
            raise ValueError(
                f"prefix {said(prefix)} and suffix {said(suffix)} must be whole numbers of at least 0 (and at most "
                f"{LARGEST})"
            )
        object.__setattr__(self, "grid", tuple(int(n) for n in axes))
        object.__setattr__(self, "prefix", int(prefix))
        object.__setattr__(self, "suffix", int(suffix))
        object.__setattr__(self, "key_layout", self._other(key_layout))

    def _other(self, key_layout: Layout | None) -> Layout | None:
        """The layout of the keys, None if it is the queries' own: one form for what means the same."""
        if key_layout is None:
            return None
        check_layout(key_layout, "key_layout")
        if key_layout.key_layout is not None:
            raise ValueError(f"key_layout={key_layout} has a key_layout itself: pass one of a single sequence")
        if key_layout.dims != self.dims:
            raise ValueError(
                f"key_layout has grid {'x'.join(map(str, key_layout.grid))} and the queries' grid is "
                f"{'x'.join(map(str, self.grid))}: both must have {self.dims} axes, an axis without extent as 1"
            )
        same = (key_layout.grid, key_layout.prefix, key_layout.suffix) == (self.grid, self.prefix, self.suffix)
        return None if same else key_layout

    @property
    def dims(self) -> int:
        """Number of grid axes."""
        return len(self.grid)

    @property
    def tokens(self) -> int:
        """Number of grid tokens."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Number of all tokens: prefix + grid + suffix."""
        return self.prefix + self.tokens + self.suffix

    @property
    def keys(self) -> Layout:
        """Where keys and values sit: `key_layout`, or this layout."""
        return self if self.key_layout is None else self.key_layout

    @property
    def queries(self) -> Layout:
        """Where the queries sit, without the keys' layout."""
        return self if self.key_layout is None else Layout(self.grid, self.prefix, self.suffix)

    @property
    def grids(self) -> tuple[tuple[int, ...]] | tuple[tuple[int, ...], tuple[int, ...]]:
        """The grid, or where they differ the queries' and the keys': the first arguments of a pattern's methods."""
        other = self.keys.grid
        return (self.grid,) if other == self.grid else (self.grid, other)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that dense attention computes."""
        return self.length * self.keys.length

    def with_keys(self, key_layout: Layout | None) -> Layout:
        """This layout with keys and values in another; itself for None.

        Raises:
            ValueError: If the keys have another number of axes, or this layout has other keys already.
        """
        if key_layout is None:
            return self
        if self.key_layout is not None:
            raise ValueError(f"layout={self} has a key_layout already: pass it once")
        return Layout(self.grid, self.prefix, self.suffix, key_layout)

    def __str__(self) -> str:
        text = f", prefix {self.prefix}" * bool(self.prefix) + f", suffix {self.suffix}" * bool(self.suffix)
        keys = "" if self.key_layout is None else f" with keys on {self.key_layout}"
        return "x".join(map(str, self.grid)) + text + keys

    def check_length(self, length: int, name: str = "q") -> None:
        """Raise a ValueError that says what would fit if `name`, a sequence of `length` tokens, does not."""
        # torch.jit.trace makes tensors of one number of all sizes.
        if getattr(length, "ndim", 0) == 0 and length == self.length:
            return
        if not _is_whole(length, 0):
            raise ValueError(f"length={said(length)} must be how many tokens {name} has, a whole number of at least 0")
        have = " + ".join(
            [f"prefix {self.prefix}"] * bool(self.prefix)
            + ["grid " + "x".join(map(str, self.grid))]
            + [f"suffix {self.suffix}"] * bool(self.suffix)
        )
        what = "layout" if name == "q" else "key_layout"
        raise ValueError(
            f"{have} has {self.length} tokens but {name} has {length}: pass {self._that_fits(length, what)}"
        )

    def _that_fits(self, length: int, name: str) -> str:
        """The call that would build a layout of `length` tokens, nearest to this one."""
        inner = length - self.prefix - self.suffix
        rows = math.prod(self.grid[:-1])
        if inner > self.tokens and inner - self.tokens <= 1024 and not self.prefix and not self.suffix:
            extra = inner - self.tokens
            return (
                f"Layout({self.grid}, prefix={extra}) or suffix={extra} if the {extra} others are text or class tokens"
            )
        side = math.isqrt(max(inner, 0))
        if self.dims == 2 and side * side == inner:
            fit: tuple[int, ...] = (side, side)
        elif inner > 0 and inner % rows == 0:
            fit = (*self.grid[:-1], inner // rows)
        else:
            return f"a grid whose sides multiply to {inner}" if inner > 0 else "a shorter prefix and suffix"
        text = f", prefix={self.prefix}" * bool(self.prefix) + f", suffix={self.suffix}" * bool(self.suffix)
        return f"{name}=Layout({fit}{text})"


def check_layout(layout: object, name: str = "layout") -> None:
    """Raise a ValueError if a layout is something else, like a grid."""
    if not isinstance(layout, Layout):
        kind = type(layout).__name__
        raise ValueError(f"{name}={said(layout)} is a {kind}: pass a Layout, like Layout((64, 64), prefix=1)")


def _is_whole(value: Any, low: int) -> bool:
    """Whether a value is a whole number of at least `low` and at most `LARGEST`, of whatever type but truth."""
    try:
        return int(value) == value and low <= value <= LARGEST and not isinstance(value, str | bool)
    except (TypeError, ValueError, OverflowError):
        return False
