"""Processors that call a group: what they ran before, and copies of those that hold no backend."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from visattn.pipelines.patch import dispatch, members
from visattn.pipelines.patch.stock import Stock


def is_dispatching(processor: Any) -> bool:
    """Whether a processor calls `dispatch_attention_fn`."""
    return hasattr(processor, "_attention_backend")


def is_patched(processor: Any) -> bool:
    """Whether a processor calls a group."""
    backend = getattr(processor, "_attention_backend", None)
    return hasattr(type(processor), "_visattn_group") or str(getattr(backend, "value", "")).startswith(members.PREFIX)


def stock_of(processor: Any) -> Stock:
    """The attention that an unpatched processor runs.

    Raises:
        ValueError: If it computes attention itself.
    """
    if is_dispatching(processor):
        return Stock(True, getattr(processor._attention_backend, "value", None))
    call: Any = type(processor).__call__
    names = set(getattr(getattr(call, "__code__", None), "co_names", ()))
    if "dispatch_attention_fn" in names:
        return Stock(True)
    if "scaled_dot_product_attention" not in names or "F" not in call.__globals__:
        raise ValueError(
            f"{type(processor).__name__} computes attention itself instead of calling torch's "
            "scaled_dot_product_attention: set the processor of the same name with 2_0, or leave its layers out with "
            "layers="
        )
    return Stock(False)


def clone(processor: Any, number: int) -> Any:
    """A copy of a processor without a backend that calls a group; it shares weights with the original."""
    copy = object.__new__(_clone_class(type(processor), number, stock_of(processor).dispatched))
    copy.__dict__.update(processor.__dict__)
    object.__setattr__(copy, "_visattn_original", processor)
    return copy


@functools.lru_cache(maxsize=1024)
def _clone_class(kind: type, number: int, dispatched: bool) -> type:
    call: Any = kind.__call__
    if dispatched:
        ours: dict[str, Any] = {"dispatch_attention_fn": dispatch.without_backend(number)}
    else:
        functional = types.SimpleNamespace(**vars(torch.nn.functional))
        functional.scaled_dot_product_attention = dispatch.sdpa(number)
        ours = {"F": functional}
    # With the module's name, Dynamo would look globals up in the real module.
    globals_ = {k: v for k, v in call.__globals__.items() if k not in ("__name__", "__spec__")} | ours
    same = types.FunctionType(call.__code__, globals_, call.__name__, call.__defaults__, call.__closure__)
    same.__kwdefaults__, same.__annotations__ = call.__kwdefaults__, call.__annotations__
    same.__qualname__, same.__doc__ = call.__qualname__, call.__doc__

    def reduce(self: Any, protocol: int) -> Any:
        return _same, (self._visattn_original,)

    body = {"__call__": same, "_visattn_group": number, "__reduce_ex__": reduce}
    made = type(kind.__name__, (kind,), body)
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
    _register_like(made, kind)
    return made


def _register_like(made: type, kind: type) -> None:
    """Let diffusers' hooks that skip the attention of a layer find a clone's class where they know the original."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry as registry

    try:
        registry.register(made, registry.get(kind))
    except ValueError:
        # They do not know the original either.
        return


def _same(processor: Any) -> Any:
    return processor
