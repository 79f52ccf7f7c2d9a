"""What calls that are alike share: launch configurations, and kernels that are ready to start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import NamedTuple

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from visattn.dispatch import Call
from visattn.kernels.triton.config import Config
from visattn.kernels.triton.start import ALIGNMENT, Starts

# So many kinds of calls are remembered, the latest ones: a model has a few at each resolution.
KINDS = 256


class Alike(NamedTuple):
    """What is decided once for calls that differ in nothing but the values of their tensors.

    Attributes:
        configs: Launch configuration of each direction.
        starts: Their kernels.
    """

    configs: dict[str, Config]
    starts: Starts


class Kinds:
    """The kinds of calls that were seen, by everything that their launches depend on."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Alike] = OrderedDict()
        self._lock = Lock()

    def of(self, key: Hashable, make: Callable[[], Alike]) -> Alike:
        """What calls with this key share."""
        found = self._known.get(key)
        if found is None:
            found = make()
            with self._lock:
                found = self._known.setdefault(key, found)
                if len(self._known) > KINDS:
                    self._known.popitem(last=False)
        return found


def kind(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float, options: tuple[bool, ...]
) -> Hashable:
    """Everything but addresses that the launches of a call depend on, and whether the addresses are aligned."""
    mask = call.key_mask
    return (
        call.pattern, call.layout, q.dtype, q.device, q.shape, k.shape, q.stride(), k.stride(), v.stride(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT == 0,
        mask is None, call.rpb is None, scale, options,
    )  # fmt: skip


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd, in either direction, or a transform of torch.func has to see a call on these tensors."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
