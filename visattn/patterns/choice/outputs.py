"""Outputs of attention that are kept for later denoising steps: where, how long, and made from what."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from visattn.keep import warms_up
from visattn.operands import wants_gradient
from visattn.patterns.choice.memory import Memory, moved, usable
from visattn.patterns.choice.quick import quick_means

# Tokens of a mean, and how many means of a short sequence there are.
RUN, FEWEST = 64, 8


def pooled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """What an output is computed from: means of runs of valid tokens of queries, keys and values, in their dtype.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D]; what is added to all of them alike changes no output and is left out.
        v: Values [B, S, Hkv, D].
        valid: bool [B, S], or None for all.

    Returns:
        [B, runs, H + 2 Hkv, D].
    """
    with torch.no_grad():
        run = max(1, min(RUN, q.shape[1] // FEWEST))
        queries, keys, values = (quick_means(x, (x.shape[1],), (run,), valid) for x in (q, k, v))
        return torch.cat([queries, keys - keys.mean(1, keepdim=True), values], 2).to(q.dtype)


@dataclass
class KeptOutput:
    """What a step keeps for those after it.

    Attributes:
        value: [B, S, H, D].
        means: What it was computed from, see `pooled`; None if nobody looks.
        step: The step.
        until: The last step that may take it.
    """

    value: torch.Tensor
    means: torch.Tensor | None
    step: int
    until: int

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(t.nbytes for t in (self.value, self.means) if t is not None)

    def moved_to(self, device: torch.device | str) -> KeptOutput:
        """The same on another device."""
        return replace(self, value=self.value.to(device), means=None if self.means is None else self.means.to(device))


@dataclass
class Slot:
    """Where a call keeps an output for the same call of later steps.

    Attributes:
        memory: Of the run.
        key: Of the call.
        every: Steps that an output is for.
        drift: How far means may move before; infinite if nobody looks.
        means: What this call computes from, None likewise.
    """

    memory: Memory
    key: Hashable
    every: int
    drift: float
    means: torch.Tensor | None

    @classmethod
    def of(
        cls, every: int, drift: float, own: Hashable, tensors: Sequence[torch.Tensor], means: Callable[[], torch.Tensor]
    ) -> Slot | None:
        """The slot of a call; None where nothing may be kept.

        Args:
            every: Steps that an output is for.
            drift: How far means may move before.
            own: What tells calls of a module apart: pattern, layout, shapes, dtype, device.
            tensors: What the output is computed from: none may need a gradient.
            means: Gives what `pooled` makes of them.
        """
        place, library = usable(), torch._C
        if place is None or place.memory is None:
            return None
        learns = wants_gradient(*tensors)
        # Tensors of transforms stand for others, and mean nothing later; the pool of a CUDA graph keeps none.
        if learns or library._are_functorch_transforms_active() or warms_up():
            return None
        memory = place.memory
        slot = cls(memory, (place.key, own), every, drift, None)
        if not math.isinf(drift) and (slot.serves or memory.get(slot.key) is not None):
            slot.means = means()
        return slot

    @property
    def serves(self) -> bool:
        """Whether a later step may take what this one keeps."""
        return self.memory.until(self.every) > self.memory.step

    def find(self) -> KeptOutput | None:
        """What an earlier step kept, None if that was too long ago, or made from what has moved since."""
        found: KeptOutput | None = self.memory.get(self.key)
        if found is None or not 0 <= self.memory.step - found.step < self.every:
            return None
        if found.step == self.memory.step or found.means is None or self.means is None:
            return found
        # Reading that waits for the device.
        return found if bool(moved(found.means, self.means) <= self.drift) else None

    def keep(self, value: torch.Tensor) -> int:
        """Keep an output in the place of an older one; returns the bytes that this takes."""
        kept = KeptOutput(value, self.means, self.memory.step, self.memory.until(self.every))
        self.memory.put(self.key, kept, kept.until)
        return kept.nbytes

    def let_go(self) -> None:
        """What is kept is of no use any more."""
        self.memory.drop(self.key)
