"""Launches for calls like an earlier one: allocate, collect addresses, start the kernels; all else is decided."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

from visattn.keep import CALL_BYTES, STORE
from visattn.kernels.triton.start import ALIGNMENT, Recorded, on, recording

# Bytes between the beginnings of two tensors of a buffer, a multiple of what kernels may ask for.
STEP = 256


class Made(NamedTuple):
    """What the launches of a call write.

    Attributes:
        results: The tensors that somebody reads as tensors.
        buffer: What the others lie in, None where there are none.
    """

    results: list[torch.Tensor]
    buffer: torch.Tensor | None


class First(NamedTuple):
    """What the launches of a first call wrote.

    Attributes:
        results: The tensors that somebody reads as tensors.
        inside: The others, contiguous, of which the launches alone know.
    """

    results: Sequence[torch.Tensor]
    inside: Sequence[torch.Tensor] = ()


class Again:
    """The launches of one call, for other tensors of the same shapes, strides and dtypes.

    Args:
        launches: What the first call started.
        given: Its tensors.
        results: What it allocated and others read.
        inside: What it allocated besides, contiguous: these lie in one buffer.
        lists: What others wrote, of which a call has the addresses alone.
    """

    def __init__(
        self,
        launches: Sequence[Recorded],
        given: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        inside: Sequence[torch.Tensor],
        lists: Sequence[torch.Tensor] = (),
    ) -> None:
        self._results = [(t.shape, t.stride(), t.dtype, t.device) for t in results]
        self._inside, self._offsets, size = [(t.shape, t.dtype, t.nbytes) for t in inside], [], 0
        for t in inside:
            self._offsets.append(size)
            size += -(-t.nbytes // STEP) * STEP
        self._buffer = ((size,), (1,), torch.uint8, given[0].device) if size else None
        # Tables of blocks, which must live as long as their addresses are here.
        self.kept: list[torch.Tensor] = []
        known = [*given, *lists, *results, *inside]
        # Addresses are told apart by the tensors that they are of.
        assert len({id(t) for t in known}) == len(known), "the launches of a call get one tensor twice"
        self._launches = []
        for start, tensors in launches:
            assert start is not None
            self._launches.append((start, [self._slot(t, known) for t in tensors]))
        self._addresses = [t.data_ptr() for t in self.kept]
        # A part of what is another tensor in the next call is no table.
        memory = {t.untyped_storage().data_ptr() for t in known} - {0}
        assert not any(t.untyped_storage().data_ptr() in memory for t in self.kept), "a launch gets a view of a tensor"

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

    def __call__(self, *given: torch.Tensor, lists: Sequence[int] = ()) -> Made | None:
        """What they write; None where addresses are less aligned."""
        addresses, low = [], 0
        for t in given:
            address = t.data_ptr()
            addresses.append(address)
            low |= address
        if low & (ALIGNMENT - 1):
            return None
        addresses += lists
        results = []
        for shape, stride, dtype, device in self._results:
            results.append(t := torch.empty_strided(shape, stride, dtype=dtype, device=device))
            addresses.append(t.data_ptr())
        buffer = None
        if self._buffer is not None:
            shape, stride, dtype, device = self._buffer
            buffer = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            addresses += self.addresses(buffer)
        addresses += self._addresses
        for start, slots in self._launches:
            start([addresses[i] for i in slots])
        return Made(results, buffer)

    def addresses(self, buffer: torch.Tensor) -> list[int]:
        """Where the tensors in a buffer are."""
        first = buffer.data_ptr()
        return [first + offset for offset in self._offsets]

    def tensors(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a buffer."""
        parts = zip(self._offsets, self._inside, strict=True)
        return [buffer[first : first + size].view(dtype).view(shape) for first, (shape, dtype, size) in parts]


def start_like(key: Hashable, given: Sequence[torch.Tensor], first: Callable[..., First]) -> Sequence[torch.Tensor]:
    """The results of launches, which are started again where an earlier call was like this one.

    Args:
        key: All that decides what is launched but shapes, strides, dtypes and device of the tensors.
        given: The tensors that a call brings; none requires a gradient where this runs.
        first: Gets them, each as a tensor of its own, starts kernels by `launch_like` and says what these wrote. What
            it passes to a kernel besides is either a part of that or a table that stays as it is.
    """
    about = (start_like, key, given[0].device, *[(t.shape, t.stride(), t.dtype) for t in given])
    entry = STORE.find(about)
    if entry is not None:
        made = entry.value(*given)
        if made is not None:
            return made.results
    # One may be given in two places here, and not in the next call.
    own = [t.view_as(t) for t in given]
    with on(own[0].device), recording() as launches:
        results, inside = first(*own)
    if entry is None and launches and all(start is not None for start, _ in launches):
        again = Again(launches, own, results, inside)
        # What nobody keeps was made for this call.
        if all(STORE.holds(t) for t in again.kept):
            STORE.put(about, again, CALL_BYTES)
    return results
