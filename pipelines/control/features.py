"""Queries of a content and keys and values of a style, stored at every step of a run for another one."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Source(NamedTuple):
    """What one call gives to others, the tokens of the grid alone.

    Attributes:
        q: Queries of the content [grid, H, D].
        k: Keys of the style [grid, Hkv, D].
        v: Values of the style [grid, Hkv, D].
        keys: Which of these keys are valid [grid], None for all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor | None

    @property
    def bytes(self) -> int:
        """What it takes."""
        return sum(each.numel() * each.element_size() for each in self if each is not None)


class Features:
    """Sources by module and step.

    Args:
        steps: How many of the run's steps they are of, its last ones.
        limit: GiB that they may take.

    Attributes:
        step: The step that is running, counted from noise.
    """

    def __init__(self, steps: int, limit: float) -> None:
        self._steps, self._limit = steps, limit
        self._found: dict[tuple[str, int], Source] = {}
        self._bytes: dict[int, int] = {}
        self.step = 0

    def keep(self, site: str, source: Source) -> None:
        """Store what a module's call has.

        Raises:
            ValueError: If it was called in this step before, or all steps together would take too much.
        """
        if (site, self.step) in self._found:
            raise ValueError(
                f"style_transfer: {site} is called twice in a step, so nothing tells what to store: use mode='batch'"
            )
        # Slices would keep the whole call alive.
        source = Source(*(None if each is None else each.detach().clone() for each in source))  # type: ignore[arg-type]
        self._found[site, self.step] = source
        in_step = self._bytes[self.step] = self._bytes.get(self.step, 0) + source.bytes
        if in_step * self._steps > self._limit * 2**30:
            raise ValueError(
                f"style_transfer: {in_step / 2**20:.1f} MiB of each of {self._steps} steps are more than the "
                f"memory={self._limit:g} GiB that mode='store' may take: choose fewer layers, a larger memory, or "
                "mode='batch', which stores nothing"
            )

    def of(self, site: str) -> Source:
        """What a module's call had in this step.

        Raises:
            ValueError: If it was not called then.
        """
        found = self._found.get((site, self.step))
        if found is None:
            raise ValueError(f"style_transfer: nothing was stored at {site} for step {self.step}: use mode='batch'")
        return found
