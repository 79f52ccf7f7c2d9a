"""Groups of tokens that are spread over the whole grid: dilation groups whose tokens all see each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Spans
from visattn.patterns.kinds import SpannedPattern
from visattn.patterns.values import PerAxis, per_axis, whole_numbers
from visattn.tiling import box_shape


@dataclass(frozen=True)
class Groups(SpannedPattern):
    """Tokens see those whose indices differ from theirs by multiples of `count` on every axis.

    Each of the groups is a coarse picture of the whole grid; with `groups(1x7x7)` on views x rows x columns it has one
    token set of every view. Beside windows, which see what is near, such layers see what is far (the grid attention of
    MaxViT, with the number of groups in the place of the tokens of one). On an axis whose length is not a multiple of
    `count` groups differ by a token.

    Source: Yang et al., "Long-Range Grouping Transformer for Multi-View 3D Reconstruction" (ICCV 2023), section 3.2,
    with 7 x 7 groups on 14 x 14 tokens of each view.

    Attributes:
        count: Groups per axis; 1 leaves an axis whole, as many as the axis has tokens or more shows each its own index
            alone.

    Raises:
        ValueError: If a number is below 1.
    """

    count: PerAxis

    name: ClassVar[str] = "groups"

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole_numbers(self.count, "count", 1))

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs."""
        per_axis(self.count, len(grid), "count")

    def step(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Groups per axis, at most one for each token: tiles hold tokens of one group."""
        return tuple(min(count, n) for count, n in zip(per_axis(self.count, len(grid), "count"), grid, strict=True))

    def spans(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
        """All members of each query's group, per axis."""
        return [_whole(n, step) for n, step in zip(grid, self.step(grid), strict=True)]

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether there is one group."""
        return all(step == 1 for step in self.step(grid))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A box of the tokens of a group."""
        return box_shape(tuple(-(-n // step) for n, step in zip(grid, self.step(grid), strict=True)), volume)


def _whole(length: int, step: int) -> Spans:
    """Every position of each query's group along one axis."""
    members = -(-(length - np.arange(length) % step) // step)
    return Spans(np.zeros(length, np.int64), members, step, length)
