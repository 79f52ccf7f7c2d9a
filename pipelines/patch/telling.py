"""How compiled code tells the attention module that it is in: by a tensor of the module, an input of its graph.

A number would be a constant of the graph, and blocks that are compiled alone would be compiled once for each module.
The tensor has the same shape and type at every module, so that one graph serves them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Where a module has its number.
NUMBER = "_visattn_number"


class _Entered:
    """The number of the module that is traced; what compiled code leaves here is read by nobody."""

    number: torch.Tensor | None = None


ENTERED = _Entered()


def number(modules: Iterable[torch.nn.Module]) -> None:
    """Give modules their numbers, in this order."""
    # On the CPU, where operators read it without waiting for a device, and good in any mode.
    with torch.inference_mode(False):
        for i, module in enumerate(modules):
            module.__dict__[NUMBER] = torch.tensor(i, device="cpu")


def forget(modules: Iterable[torch.nn.Module]) -> None:
    """Take the numbers away."""
    for module in modules:
        module.__dict__.pop(NUMBER, None)


def enter(module: Any) -> None:
    """Trace that a module is entered."""
    found = getattr(module, NUMBER, None)
    if found is not None:
        ENTERED.number = found
