"""Forwards of patched classes that others keep, and what accelerate's hooks do around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# Where accelerate keeps its hook of a module.
HOOK = "_hf_hook"
HOOKED = "accelerate has put a hook in its place: call apply() before its hooks and offloading"


def while_patched(made: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class that a patch gives to modules; for a module that has its own class back, that one's."""

    @functools.wraps(forward)
    def current(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, made) else type(self).forward)(self, *args, **kwargs)

    return current


def keeps_forward(module: nn.Module, kinds: Iterable[type]) -> bool:
    """Whether a module has the forward of its class among its attributes, where accelerate leaves it behind.

    Args:
        module: The module.
        kinds: Its class, and the one that a patch gives to it.
    """
    kept = module.__dict__.get("forward")
    functions = [getattr(kind, "forward", None) for kind in kinds]
    return getattr(kept, "__self__", None) is module and getattr(kept, "__func__", None) in functions


def check_loaded(attention: nn.Module, path: str) -> None:
    """Refuse parameters that accelerate loads when their module is called, where a block reads them without that.

    Args:
        attention: The module.
        path: Of the block.

    Raises:
        ValueError: If some are not there.
    """
    if HOOK not in attention.__dict__:
        return
    away = [name for name, value in attention.named_parameters(recurse=False) if value.is_meta]
    if away:
        raise ValueError(
            f"accelerate loads {', '.join(away)} of the attention of {path} when that is called, and its block reads "
            "them itself to run a pattern: offload the whole model (cpu_offload_with_hook) or whole blocks "
            "(attach_align_device_hook_on_blocks)"
        )
