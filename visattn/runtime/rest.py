"""Calls of modules that are left to the model's own code, seen before anything of a pattern is looked at.

Where the host is what a step waits for, a dense call must touch little: at a module that was left dense in a forward
like this one, for tokens like these, the code that the patch replaced runs, and one count goes up.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch

from visattn.counts import Cell
from visattn.tally import Tally


class Watching(Protocol):
    """What of a model's run says how a call is to be seen."""

    tally: Tally
    # Where each thread is; a perturbed forward is seen whole.
    here: Any

    @property
    def watcher(self) -> Any:
        """Who sees every call, or None."""
        ...


# How a forward notes such a module, "" where it does not.
Mark = Literal["", "excused", "resting"]


class Rested(NamedTuple):
    """What a call was that its model's own attention made.

    Attributes:
        run: The run of the model.
        cell: Where it counts.
        mark: How its forward notes it.
    """

    run: Watching
    cell: Cell
    mark: Mark


class Rest(NamedTuple):
    """A module in forwards of one kind.

    Attributes:
        path: Of the module.
        shape: Of its tokens.
        dtype: Of its tokens.
        device: Of its tokens: on another one the pattern may pay.
        rested: What its calls are.
    """

    path: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rested: Rested

    def passes(self, forward: Any, tokens: torch.Tensor) -> bool:
        """Whether a call with these tokens is one of them, and need not be timed; it is counted then."""
        run, cell, mark = self.rested
        if (
            tokens.shape != self.shape
            or tokens.dtype != self.dtype
            or tokens.device != self.device
            or run.watcher is not None
            or run.here.perturbed is not None
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
            or torch._C._len_torch_function_stack()
            or not run.tally.pass_on(cell)
        ):
            return False
        if mark:
            getattr(forward, mark).add(self.path)
        return True
