"""Attention modules without a processor: for the time of a patch their own forward is one.

It is what diffusers' processors are, code that calls torch's attention, so that all that is done with processors is
done with it: clones whose attention is ours, repair, copies that are stock.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


class Forward:
    """A module's forward as a processor; of a class of its own for each class of modules, see `forward_of`."""

    kind: type[torch.nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return forward_of, (self.kind,)


def forward_of(kind: type[torch.nn.Module]) -> Forward:
    """The forward of a class of modules that use nothing of themselves, as a processor."""
    return _class_of(kind)()


@functools.lru_cache(maxsize=64)
def _class_of(kind: type[torch.nn.Module]) -> type[Forward]:
    return type(f"{kind.__name__}Forward", (Forward,), {"kind": kind, "__call__": kind.forward})


def give_processor(module: torch.nn.Module) -> None:
    """Let a module without a processor have one, which its forward calls."""
    if not hasattr(module, "processor"):
        own: Any = module
        own.processor = forward_of(type(module))
        # Unlike a method, it can be pickled under a name that its class does not have.
        own.forward = functools.partial(_by_processor, module)


def take_processor(module: torch.nn.Module) -> None:
    """Undo `give_processor`; a forward that somebody else has set since stays."""
    own = vars(module)
    if isinstance(own.get("processor"), Forward):
        del own["processor"]
        if getattr(own.get("forward"), "func", None) is _by_processor:
            del own["forward"]


def _by_processor(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module.processor(*args, **kwargs)
