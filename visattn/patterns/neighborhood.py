"""Neighborhood attention with stride (GNA), dilation and causal axes, in one to three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from visattn.patterns.geometry import Spans, nearest
from visattn.patterns.kinds import BiasedPattern
from visattn.patterns.values import PerAxis, aligned, flags, per_axis, whole_numbers
from visattn.tiling import box_shape


@dataclass(frozen=True)
class Neighborhood(BiasedPattern):
    """Each query sees a window around it; at a border the window is shifted inward, never cut.

    Sources: Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023), section 3.1; "Dilated
    Neighborhood Attention Transformer" (2022), section 3.2; "Generalized Neighborhood Attention" (2025),
    section 3 for the stride: `stride` neighbouring queries share the window of their centre query.

    Attributes:
        window: Keys per axis, odd or even; -1, or anything longer than the axis, is the whole axis. An even
            window reaches one key further back than ahead.
        stride: Neighbouring queries that share one window, at most the window. The window as stride gives
            blocked attention.
        dilation: Distance of neighbouring keys; window * dilation must fit the axis where it is above 1.
        causal: Whether a query sees no key after itself on that axis.
        circular: Whether that axis wraps around (longitudes, panoramas, k-space): the window is never shifted there. A
            dilation must divide such an axis.

    Where keys are on a grid of their own, a window is so many keys of that grid: those nearest to the query's centre
    (of two equally near ones the first), in which both grids span the same extent.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    window: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False
    circular: bool | tuple[bool, ...] = False

    name: ClassVar[str] = "na"
    two_grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        values = {
            "window": whole_numbers(self.window, "window", 1, also=(-1,)),
            "stride": whole_numbers(self.stride, "stride", 1),
            "dilation": whole_numbers(self.dilation, "dilation", 1),
            "causal": flags(self.causal, "causal"),
            "circular": flags(self.circular, "circular"),
        }
        for name, value in aligned(values, self).items():
            object.__setattr__(self, name, value)
        for window, stride in self._zipped("window", "stride"):
            if window != -1 and stride > window:
                raise ValueError(
                    f"stride {stride} is larger than window {window}, so some queries would not see themselves: "
                    f"use a stride of at most {window}"
                )
        for window, dilation in self._zipped("window", "dilation"):
            if window == -1 and dilation > 1:
                raise ValueError(
                    f"window -1 is the whole axis, so dilation {dilation} means nothing: use dilation 1 there"
                )
        if any(causal and circular for causal, circular in self._zipped("causal", "circular")):
            raise ValueError(
                "causal and circular exclude each other on an axis: on a ring no key is after another; give them per "
                "axis, like causal=1x0x0, circular=0x0x1"
            )

    def _zipped(self, first: str, second: str) -> list[tuple[Any, Any]]:
        a, b = getattr(self, first), getattr(self, second)
        dims = max(len(v) if isinstance(v, tuple) else 1 for v in (a, b))
        return list(zip(per_axis(a, dims, first), per_axis(b, dims, second), strict=True))

    def check(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError if the number of axes differs, or what was asked for means nothing on an axis."""
        for name in ("window", "stride", "dilation", "causal", "circular"):
            per_axis(getattr(self, name), len(grid), name)
        rows = zip(grid, keys or grid, self.axes(grid, keys), self.rings(grid), strict=True)
        for i, (length, key_length, (window, _, dilation, causal), circular) in enumerate(rows):
            where = f"axis {i} of grid {'x'.join(map(str, grid))} ({length})"
            if dilation > 1 and window * dilation > length:
                raise ValueError(
                    f"window {window} * dilation {dilation} = {window * dilation} is larger than {where}: "
                    f"use a dilation of at most {max(1, length // window)} or a smaller window"
                )
            if circular and length % dilation:
                raise ValueError(
                    f"dilation {dilation} does not divide {where}, so steps around that ring end beside where they "
                    f"began: use a dilation that divides {length}, or circular=false there"
                )
            if length != key_length and (dilation > 1 or causal):
                what = f"dilation={dilation}" if dilation > 1 else "causal=true"
                raise ValueError(
                    f"{what} needs queries and keys at the same places, but {where} has {key_length} keys: "
                    "leave it out on that axis"
                )

    def axes(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[tuple[int, int, int, bool]]:
        """Window, stride, dilation and causal per axis, with the window at most the axis (of the keys)."""
        dims = len(grid)
        rows = zip(
            keys or grid,
            per_axis(self.window, dims, "window"),
            per_axis(self.stride, dims, "stride"),
            per_axis(self.dilation, dims, "dilation"),
            per_axis(self.causal, dims, "causal"),
            strict=True,
        )
        return [
            (n if window == -1 or (window > n and dilation == 1) else window, stride, dilation, causal)
            for n, window, stride, dilation, causal in rows
        ]

    def rings(self, grid: tuple[int, ...]) -> tuple[bool, ...]:
        """Whether each axis wraps around."""
        return per_axis(self.circular, len(grid), "circular")

    def spans(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
        """The visible positions of each query, per axis."""
        rows = zip(grid, keys or grid, self.axes(grid, keys), self.rings(grid), strict=True)
        return [_spans(n, key_n, *axis, circular) for n, key_n, axis, circular in rows]

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """Whether the window is the whole grid."""
        rows = zip(keys or grid, self.axes(grid, keys), strict=True)
        return all(window == n and not causal for n, (window, _, _, causal) in rows)

    def rpb_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """2 * window - 1 per axis, for the window as given (-1 is the axis)."""
        windows = per_axis(self.window, len(grid), "window")
        return tuple(2 * (n if window == -1 else window) - 1 for n, window in zip(grid, windows, strict=True))

    def step(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The dilation: tiles hold tokens of one dilation group."""
        return tuple(dilation for _, _, dilation, _ in self.axes(grid))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A cube-like box of the tokens of a dilation group."""
        return box_shape(tuple(-(-n // d) for n, d in zip(grid, self.step(grid), strict=True)), volume)


def _spans(length: int, keys: int, window: int, stride: int, dilation: int, causal: bool, circular: bool) -> Spans:
    """Visible positions along one axis, for each query in its dilation group."""
    index = np.arange(length)
    group, position = index % dilation, index // dilation
    members = -(-(length - group) // dilation)
    block = position // stride * stride
    if causal:
        leader = np.minimum(block + stride - 1, members - 1)
        return Spans(np.maximum(leader - window + 1, 0), position + 1, dilation)
    leader = np.minimum(block + stride // 2, members - 1)
    if length == keys:
        start = leader - window // 2
    else:
        start, members = nearest(leader, length, keys, window), np.full(length, keys)
    if circular and window < keys // dilation:
        return Spans(start, start + window, dilation, keys, True)
    start = np.clip(start, 0, members - window)
    return Spans(start, start + window, dilation, keys)
