"""Neighborhood attention with stride (GNA), dilation and causal axes, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Spans
from visattn.patterns.kinds import BiasedPattern
from visattn.patterns.values import PerAxis, aligned, flag, per_axis, whole_numbers
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

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    window: PerAxis
    stride: PerAxis = 1
    dilation: PerAxis = 1
    causal: bool | tuple[bool, ...] = False

    name: ClassVar[str] = "na"

    def __post_init__(self) -> None:
        causal = self.causal
        each = tuple(causal) if isinstance(causal, Sequence) and not isinstance(causal, str) else (causal,)
        flags = tuple(flag(value, "causal") for value in each)
        values = {
            "window": whole_numbers(self.window, "window", 1, also=(-1,)),
            "stride": whole_numbers(self.stride, "stride", 1),
            "dilation": whole_numbers(self.dilation, "dilation", 1),
            "causal": flags if isinstance(causal, Sequence) else flags[0],
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

    def _zipped(self, first: str, second: str) -> list[tuple[int, int]]:
        a, b = getattr(self, first), getattr(self, second)
        dims = max(len(v) if isinstance(v, tuple) else 1 for v in (a, b))
        return list(zip(per_axis(a, dims, first), per_axis(b, dims, second), strict=True))

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs or a dilated window does not fit an axis."""
        for name in ("window", "stride", "dilation", "causal"):
            per_axis(getattr(self, name), len(grid), name)
        for i, (length, (window, _, dilation, _)) in enumerate(zip(grid, self.axes(grid), strict=True)):
            if dilation > 1 and window * dilation > length:
                raise ValueError(
                    f"window {window} * dilation {dilation} = {window * dilation} is larger than axis {i} of grid "
                    f"{'x'.join(map(str, grid))} ({length}): "
                    f"use a dilation of at most {max(1, length // window)} or a smaller window"
                )

    def axes(self, grid: tuple[int, ...]) -> list[tuple[int, int, int, bool]]:
        """Window, stride, dilation and causal per axis, with the window at most the axis."""
        dims = len(grid)
        rows = zip(
            grid,
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

    def spans(self, grid: tuple[int, ...]) -> list[Spans]:
        """The visible positions of each query, per axis."""
        return [_spans(n, *axis) for n, axis in zip(grid, self.axes(grid), strict=True)]

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether the window is the whole grid."""
        return all(window == n and not causal for n, (window, _, _, causal) in zip(grid, self.axes(grid), strict=True))

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


def _spans(length: int, window: int, stride: int, dilation: int, causal: bool) -> Spans:
    """Visible positions along one axis, for each query in its dilation group."""
    index = np.arange(length)
    group, position = index % dilation, index // dilation
    members = -(-(length - group) // dilation)
    block = position // stride * stride
    if causal:
        leader = np.minimum(block + stride - 1, members - 1)
        return Spans(np.maximum(leader - window + 1, 0), position + 1, dilation)
    leader = np.minimum(block + stride // 2, members - 1)
    start = np.clip(leader - window // 2, 0, members - window)
    return Spans(start, start + window, dilation)
