"""BDIA: each step goes out from the last two states, so that either end of three gives the other."""

from __future__ import annotations

from typing import Any

import torch

from visattn.given import real
from visattn.pipelines.schedulers.exact import ExactScheduler, Pair
from visattn.pipelines.schedulers.wide import Wide


class BDIAScheduler(ExactScheduler):
    """Exact steps with one evaluation of the model each.

    A step averages the plain step on from a state with the plain step back from it to the state before. The first
    step, which has no state before, is plain, and so is the first step back from a picture.

    Args:
        gamma: Weight of the step back, in (0, 1]. Errors on the way back grow like gamma to the minus steps.
        **settings: See `ExactScheduler`.

    Raises:
        ValueError: If `gamma` is out of range, or a setting has no inverse.

    Source: Zhang et al., Exact Diffusion Inversion via Bi-directional Integration Approximation, section 4.
    """

    _behind = 1

    def __init__(self, gamma: float = 1.0, **settings: Any) -> None:
        must = "above 0 and at most 1; 1 is usual from 40 steps on"
        self.gamma = real(gamma, "gamma", must, lambda x: 0 < x <= 1)
        super().__init__(**settings)

    def _own(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    @property
    def _remedy(self) -> str:
        return f"a gamma nearer to 1 than {self.gamma}"

    def _growth(self, steps: int) -> float:
        return self.gamma**-steps

    def _evaluated(self, timesteps: torch.Tensor) -> torch.Tensor:
        if not self.inverse:
            return timesteps
        # The plain step back from the clean sample takes the timestep of the state that it leads to.
        return torch.cat([timesteps[-1:], timesteps[1:].flip(0)])

    def _begin_from(self, sample: Wide) -> None:
        self._pair = [sample]

    def _ends(self) -> Pair:
        # The noisier one first.
        first, second = super()._ends()
        return (second, first) if self.inverse else (first, second)

    def _resumed(self, state: Pair, steps: int) -> tuple[list[Wide], Wide]:
        pair = [state[1], state[0]] if self.inverse else list(state)
        return pair, pair[1]

    def _advance(self, output: torch.Tensor, at: int) -> Wide:
        assert self.num_inference_steps is not None
        # Evaluations that are behind the states with which the run began are not in its list.
        at += self.num_inference_steps - len(self.timesteps)
        z, steps = self._pair[-1], self._steps
        level = self.num_inference_steps - at if self.inverse else at
        if len(self._pair) == 1:
            return self._plain(output, z, level)
        said, other = steps.said(output, z, level), self._pair[0]
        back, on = steps.move(z, said, level, level - 1), steps.move(z, said, level, level + 1)
        found = (other - on) / self.gamma + back if self.inverse else on + (other - back) * self.gamma
        self._pair = [z, found]
        return found

    def _plain(self, output: torch.Tensor, z: Wide, level: int) -> Wide:
        """A step from the only state there is."""
        steps = self._steps
        start = level - 1 if self.inverse else level
        said = steps.said(output, z, start)
        found = steps.back(z, said, start, level) if self.inverse else steps.move(z, said, start, start + 1)
        self._pair = [z, found]
        return found


class BDIAInverseScheduler(BDIAScheduler):
    """The way back of `BDIAScheduler`: from its last two states, or from a picture, to noise."""

    inverse = True
