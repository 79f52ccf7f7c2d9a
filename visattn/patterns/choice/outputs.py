"""Outputs of attention that are kept for later denoising steps: where, how long, and made from what."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from visattn.patterns.choice.memory import Means, Memory, usable


@dataclass
class KeptOutput:
    """What a step keeps for those after it.

    Attributes:
        value: [B, S, H, D].
        means: What it was computed from, None if nobody looks.
        step: The step.
        until: The last step that may take it.
    """

    value: torch.Tensor
    means: Means | None
    step: int
    until: int

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(t.nbytes for t in (self.value, *(self.means or ())) if t is not None)

    def moved_to(self, device: torch.device | str) -> KeptOutput:
        """The same on another device."""
        means = None if self.means is None else Means(*(t if t is None else t.to(device) for t in self.means))  # type: ignore[arg-type]
        return replace(self, value=self.value.to(device), means=means)


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
    means: Means | None

    @classmethod
    def of(
        cls, every: int, drift: float, own: Hashable, tensors: Sequence[torch.Tensor], means: Callable[[], Means]
    ) -> Slot | None:
        """The slot of a call; None where nothing may be kept.

        Args:
            every: Steps that an output is for.
            drift: How far means may move before.
            own: What tells calls of a module apart: pattern, layout, shapes, dtype, device.
            tensors: What the output is computed from: none may need a gradient.
            means: Pools them.
        """
        place, library = usable(), torch._C
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # Tensors of transforms stand for others, and mean nothing later.
        if place is None or place.memory is None or learns or library._are_functorch_transforms_active():
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
        moved = found.step != self.memory.step and found.means is not None and self.means is not None
        # Reading that waits for the device.
        if moved and not bool(found.means.moved(self.means) <= self.drift):  # type: ignore[union-attr]
            return None
        return found

    def keep(self, value: torch.Tensor) -> int:
        """Keep an output in the place of an older one; returns the bytes that this takes."""
        means = None if self.means is None else self.means.to(value.dtype)
        kept = KeptOutput(value, means, self.memory.step, self.memory.until(self.every))
        self.memory.put(self.key, kept, kept.until)
        return kept.nbytes

    def let_go(self) -> None:
        """What is kept is of no use any more."""
        self.memory.drop(self.key)
