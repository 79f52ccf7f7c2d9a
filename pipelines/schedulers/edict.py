"""EDICT: two states that are updated in turns, each by what the model says of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visattn.given import real
from visattn.pipelines.schedulers.exact import ExactScheduler, Pair
from visattn.pipelines.schedulers.wide import Wide


class EDICTScheduler(ExactScheduler):
    """Exact steps with two evaluations of the model each.

    Each step updates one state from the model's output at the other, then the other from it, and mixes both. The
    order alternates from step to step. Runs in stock pipelines as a scheduler of order 2: every timestep twice.

    Args:
        mixing: Share p of itself that a state keeps in mixing, in (0, 1]. 1 is the most exact, but the states part.
        **settings: See `ExactScheduler`.

    Raises:
        ValueError: If `mixing` is out of range, or a setting has no inverse.

    Source: Wallace et al., EDICT: Exact Diffusion Inversion via Coupled Transformations, section 4.
    """

    order = 2

    def __init__(self, mixing: float = 0.93, **settings: Any) -> None:
        self.mixing = real(mixing, "mixing", "above 0 and at most 1; 0.93 is usual", lambda x: 0 < x <= 1)
        super().__init__(**settings)

    def _own(self) -> dict[str, Any]:
        return {"mixing": self.mixing}

    @property
    def _remedy(self) -> str:
        return f"a mixing nearer to 1 than {self.mixing}"

    def _growth(self, steps: int) -> float:
        return self.mixing ** (-2 * steps)

    def _evaluated(self, timesteps: torch.Tensor) -> torch.Tensor:
        return (timesteps.flip(0) if self.inverse else timesteps).repeat_interleave(2)

    def _begin_from(self, sample: Wide) -> None:
        self._pair = self._unmixed([sample, sample]) if self.inverse else [sample, sample]

    def _resumed(self, state: Pair, steps: int) -> tuple[list[Wide], Wide]:
        pair = self._unmixed(state) if self.inverse else list(state)
        return pair, pair[self._chosen(0, steps)]

    def _step_of(self, at: int, steps: int) -> int:
        """The step of an evaluation, counted from noise."""
        return steps - 1 - at // 2 if self.inverse else at // 2

    def _chosen(self, at: int, steps: int) -> int:
        """Which state an evaluation is of."""
        # A step updates this one first, from the other; its inverse starts with what came last.
        first = self._step_of(at, steps) % 2
        return first ^ (at % 2) ^ (not self.inverse)

    def _advance(self, output: torch.Tensor, at: int) -> Wide:
        assert self.num_inference_steps is not None
        steps, number = self._steps, self.num_inference_steps
        step, seen, last = self._step_of(at, number), self._chosen(at, number), at + 1 == len(self.timesteps)
        said = steps.said(output, self._pair[seen], step)
        turn = steps.back if self.inverse else steps.move
        self._pair[1 - seen] = turn(self._pair[1 - seen], said, step, step + 1)
        if at % 2 and not self.inverse:
            x, y, p = *self._pair, self.mixing
            x = x * p + y * (1 - p)
            self._pair = [x, y * p + x * (1 - p)]
        elif at % 2 and not last:
            self._pair = self._unmixed(self._pair)
        return self._pair[0 if last else self._chosen(at + 1, number)]

    def _unmixed(self, pair: Sequence[Wide]) -> list[Wide]:
        """Two states as they were before a step mixed them."""
        x, y, p = *pair, self.mixing
        y = (y - x * (1 - p)) / p
        return [(x - y * (1 - p)) / p, y]


class EDICTInverseScheduler(EDICTScheduler):
    """The way back of `EDICTScheduler`: from its last states, or from a picture, to noise."""

    inverse = True
