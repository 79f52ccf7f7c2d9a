"""A choice for calls like an earlier one: allocate, collect addresses, start the kernels; all else is decided."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visattn.kernels.triton.start import ALIGNMENT, Recorded
from visattn.patterns import Routes


class Again:
    """The launches of one choice, for other queries and keys of the same shapes, strides and dtype.

    Args:
        launches: What the first call started.
        given: Its grid queries and keys.
        made: What it allocated: first the lists, then how many of each count, then what else its kernels write.
        counted: Whether lists have counts.
    """

    def __init__(
        self,
        launches: Sequence[Recorded],
        given: tuple[torch.Tensor, torch.Tensor],
        made: Sequence[torch.Tensor],
        counted: bool,
    ) -> None:
        self._counted = counted
        self._made = [(t.shape, t.stride(), t.dtype, t.device) for t in made]
        # Tables of blocks, which must live as long as their addresses are here.
        self.kept: list[torch.Tensor] = []
        known = [*given, *made]
        self._launches = []
        for start, tensors in launches:
            assert start is not None
            self._launches.append((start, [self._slot(t, known) for t in tensors]))
        self._addresses = [t.data_ptr() for t in self.kept]

    def _slot(self, t: torch.Tensor, known: list[torch.Tensor]) -> int:
        """Where the address of a tensor is among those of a call: kept ones lie behind the others."""
        for i, other in enumerate(known):
            if t is other:
                return i
        for i, other in enumerate(self.kept):
            if t is other:
                return len(known) + i
        self.kept.append(t)
        return len(known) + len(self.kept) - 1

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> Routes | None:
        """What they choose; None where their addresses are less aligned."""
        addresses = [q.data_ptr(), k.data_ptr()]
        if (addresses[0] | addresses[1]) & (ALIGNMENT - 1):
            return None
        made = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in self._made
        ]
        addresses += [t.data_ptr() for t in made]
        addresses += self._addresses
        for start, slots in self._launches:
            start([addresses[i] for i in slots])
        return Routes(made[0], made[1] if self._counted else None)
