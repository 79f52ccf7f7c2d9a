"""The members of diffusers' enum of attention backends that stand for groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from visattn.pipelines.patch import numbering

PREFIX = "visattn:"
_BLOCK = 64


@functools.lru_cache(maxsize=1024)
def member(number: int) -> Any:
    """The member of diffusers' enum of attention backends that stands for a group.

    It is not listed in the enum: only processors that hold it know it. One object per number, because compiled
    code is valid for one object.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    found: Any = str.__new__(AttentionBackendName, f"{PREFIX}{number}")
    found._name_ = found._value_ = f"{PREFIX}{number}"

    def original() -> Any:
        stock = numbering.stock_of(number)
        name = None if stock is None else stock.backend
        return None if name is None else AttentionBackendName(name)

    # A copied or pickled model gets its own backend back. Neither module looks at the class first.
    found.__deepcopy__ = lambda memo: original()
    found.__reduce_ex__ = lambda protocol: (backend_named, (getattr(original(), "value", None),))
    return found


def backend_named(name: str | None) -> Any:
    """The member of diffusers' enum of backends with a name, None for None."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return None if name is None else AttentionBackendName(name)


def register_member(number: int, function_of: Callable[[int], Callable[..., torch.Tensor]]) -> None:
    """Make diffusers call a group wherever a processor holds its member.

    Args:
        number: Of the group.
        function_of: The attention function of a group, by number.

    Members are registered by the block: compiled code is valid for one size of diffusers' table, so that a table
    that grew with each patched model would recompile all others.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    for other in range(number // _BLOCK * _BLOCK, (number // _BLOCK + 1) * _BLOCK):
        if member(other) not in registry._backends:
            registry.register(member(other), supports_context_parallel=True)(function_of(other))


def unregister_members() -> None:
    """Leave diffusers' table as it was, unless some processor still needs it."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    if any(lease.stock is not None and lease.stock.dispatched for lease in numbering.leases()):
        return
    for ours in [m for m in registry._backends if str(m.value).startswith(PREFIX)]:
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(ours, None)
        registry._supports_context_parallel.discard(ours.value)
