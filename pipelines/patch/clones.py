"""Processors that call a group, and the way back to those they stand for.

A processor that holds a backend stays where it is and gets the member of a group. Of any other one a clone takes its
place: the same code with another `F` or `dispatch_attention_fn`, or, where the code does not call them by these
names, the same code watched while it runs.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from visattn.pipelines.patch import dispatch, members, telling
from visattn.pipelines.patch.calling import Calling, calling_of
from visattn.pipelines.patch.interception import intercepted
from visattn.pipelines.patch.numbering import Lease
from visattn.runtime.forward import Here
from visattn.runtime.rest import Rest

# What a clone has beyond the attributes of its original.
_ORIGINAL, _LEASE, _PLACE = "_visattn_original", "_visattn_lease", "_visattn_place"


def is_clone(processor: Any) -> bool:
    """Whether a processor stands for another one."""
    return _ORIGINAL in getattr(processor, "__dict__", {})


def calls_by_backend(processor: Any) -> bool:
    """Whether one of ours calls its group by the backend that it holds, rather than by its class."""
    return not hasattr(type(processor), "_visattn_group")


def lease_of(processor: Any) -> Lease | None:
    """By which a processor calls a group, None if it calls none."""
    lease = getattr(processor, "__dict__", {}).get(_LEASE)
    if lease is None or not calls_by_backend(processor):
        return lease
    return lease if getattr(processor, "_attention_backend", None) is members.member(lease.number) else None


class Place(NamedTuple):
    """The module that a clone was made for.

    Attributes:
        here: Where each thread is.
        path: Path of the module.
        index: Its number among those that are patched.
        module: A reference to it.
    """

    here: Here
    path: str
    index: int
    module: weakref.ref[torch.nn.Module]

    def enter(self, caller: Any) -> None:
        """This thread enters the module, unless it is outside of the model and somebody else's module that calls."""
        if self.here.forward is not None or caller is self.module():
            self.here.site = self.path


def place_of(processor: Any) -> Place | None:
    """The module that a clone was made for, None for what is no clone."""
    return getattr(processor, "__dict__", {}).get(_PLACE)


def says_where(processor: Any) -> bool:
    """Whether a processor says at each call in which module it is, so that the module needs no hook."""
    return hasattr(type(processor), "_visattn_says_where")


def is_patched(processor: Any) -> bool:
    """Whether a processor calls a group that is there."""
    lease = lease_of(processor)
    return lease is not None and lease.owner is not None


def original_of(processor: Any) -> Any:
    """The processor that one of ours stands for, itself if it is none of ours."""
    return processor.__dict__[_ORIGINAL] if is_clone(processor) else processor


def give_member(processor: Any, lease: Lease, shared: bool) -> Any:
    """Make a processor that holds a backend call a group; a copy of it if it serves other modules too."""
    given = processor
    if shared:
        given = object.__new__(type(processor))
        given.__dict__.update(processor.__dict__)
        object.__setattr__(given, _ORIGINAL, processor)
    object.__setattr__(given, _LEASE, lease)
    given._attention_backend = members.member(lease.number)
    return given


def clone(processor: Any, lease: Lease, place: Place) -> Any:
    """A copy of a processor that calls a group at one module; it shares weights with the original."""
    kind, calling = type(processor), calling_of(processor)
    if not hasattr(processor, "__dict__") or isinstance(processor, types.FunctionType | types.MethodType):
        copy = object.__new__(_class_for_function(lease.number))
    else:
        copy = object.__new__(_clone_class(kind, lease.number, calling))
        copy.__dict__.update(processor.__dict__)
    object.__setattr__(copy, _ORIGINAL, processor)
    object.__setattr__(copy, _LEASE, lease)
    object.__setattr__(copy, _PLACE, place)
    return copy


def make_stock(processor: Any) -> None:
    """Turn one of ours into what it stands for, wherever it is kept: the same class, without a number."""
    own = processor.__dict__
    lease = own.pop(_LEASE, None)
    if hasattr(type(processor), "_visattn_kind"):
        kind = type(processor)._visattn_kind
        if kind is not None:
            object.__setattr__(processor, "__class__", kind)
            original, backend = own.pop(_ORIGINAL, None), getattr(processor, "_attention_backend", None)
            if original is not None and backend is not getattr(original, "_attention_backend", None):
                # Set after the patch, it is for the processor that the clone stood for.
                original._attention_backend = backend
            own.pop(_PLACE, None)
        return
    original = own.pop(_ORIGINAL, None)
    if lease is None or processor._attention_backend is not members.member(lease.number):
        if original is not None:
            # A backend that was set for one user of a shared processor is set for all.
            original._attention_backend = processor._attention_backend
        return
    assert lease.stock is not None
    backend = members.backend_named(lease.stock.backend)
    if backend is None and original is None:
        # As it was made: the class says that there is none.
        del processor._attention_backend
    if getattr(processor, "_attention_backend", None) is not backend:
        processor._attention_backend = backend


@functools.lru_cache(maxsize=1024)
def _clone_class(kind: type, number: int, calling: Calling) -> type:
    call: Any = kind.__call__
    body: dict[str, Any] = {"_visattn_group": number, "_visattn_kind": kind}
    if calling is Calling.UNKNOWN:
        body["__call__"] = intercepted(call, number)
    else:
        body |= {"__call__": _saying_where(_same_code(call, number, calling), call), "_visattn_says_where": True}

    def reduce(self: Any, protocol: int) -> Any:
        return _same, (self._visattn_original,)

    # Loaders make new processors of the classes that they find.
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return kind(*args, **kwargs)

    body |= {"__new__": new, "__reduce_ex__": reduce}
    made = type(kind.__name__, (kind,), body)
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
    _register_like(made, kind)
    return made


def _same_code(call: Any, number: int, calling: Calling) -> types.FunctionType:
    """The code of a processor with its `F` or `dispatch_attention_fn` replaced."""
    if calling is Calling.DISPATCH:
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
    return same


def _saying_where(call: types.FunctionType, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A processor's call that first says in which module it is; a hook of the module would cost far more.

    Args:
        call: The call, with our attention.
        stock: As it is without visattn.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if args:
                telling.enter(args[0])
            return call(self, *args, **kwargs)
        here, path, _, module = self._visattn_place
        forward = here.forward
        # As in `Place.enter`, without another function call.
        if forward is None:
            if args and args[0] is module():
                here.site = path
            return call(self, *args, **kwargs)
        here.site = path
        for value in kwargs.values():
            if value is not None:
                return call(self, *args, **kwargs)
        rest = forward.rests.get(path)
        if rest is not None and len(args) == 2 and rest.passes(forward, args[1]):
            return stock(self, *args, **kwargs)
        here.rested = None
        out = call(self, *args, **kwargs)
        if here.rested and len(args) == 2 and not torch.is_grad_enabled():
            tokens = args[1]
            forward.rests[path] = Rest(path, tokens.shape, tokens.dtype, tokens.device, here.rested)
        return out

    functools.update_wrapper(run, call)
    # diffusers asks for it at every call, and works it out each time.
    run.__signature__ = inspect.signature(call)
    return run


@functools.lru_cache(maxsize=1024)
def _class_for_function(number: int) -> type:
    """A class whose objects call the function that they stand for."""

    class Processor:
        _visattn_group, _visattn_kind = number, None

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _same, (self._visattn_original,)  # type: ignore[attr-defined]

        @property
        def __call__(self) -> Any:
            original = self._visattn_original  # type: ignore[attr-defined]
            return intercepted(original, number, self) if is_patched(self) else original

    return Processor


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
