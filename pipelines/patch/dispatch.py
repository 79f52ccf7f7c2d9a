"""How the two generations of diffusers' attention processors are made to call a group.

Newer processors call `dispatch_attention_fn` with the backend they hold: they get a member of diffusers' enum of
backends that belongs to the group. Older ones call torch's SDPA, or `dispatch_attention_fn` without a backend: they
are replaced by a clone whose code is the same but whose `F` or `dispatch_attention_fn` is ours. All keep running
diffusers' own code for everything around the attention.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from visattn.pipelines.patch import operators
from visattn.pipelines.patch.operators import Stock
from visattn.pipelines.patch.parallel import degree

_MEMBER = "visattn:"
_BLOCK = 64


def is_dispatching(processor: Any) -> bool:
    """Whether a processor calls `dispatch_attention_fn`."""
    return hasattr(processor, "_attention_backend")


def is_patched(processor: Any) -> bool:
    """Whether a processor calls a group."""
    backend = getattr(processor, "_attention_backend", None)
    return hasattr(type(processor), "_visattn_group") or str(getattr(backend, "value", "")).startswith(_MEMBER)


@functools.lru_cache(maxsize=1024)
def member(number: int) -> Any:
    """The member of diffusers' enum of attention backends that stands for a group.

    It is not listed in the enum: only processors that hold it know it. One object per number, because compiled
    code is valid for one object.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    found: Any = str.__new__(AttentionBackendName, f"{_MEMBER}{number}")
    found._name_ = found._value_ = f"{_MEMBER}{number}"

    def original() -> Any:
        group = operators.look_up(number)
        name = None if group is None else group.stock.backend
        return None if name is None else AttentionBackendName(name)

    # A copied or pickled model gets its own backend back. Neither module looks at the class first.
    found.__deepcopy__ = lambda memo: original()
    found.__reduce_ex__ = lambda protocol: (backend_named, (getattr(original(), "value", None),))
    return found


def backend_named(name: str | None) -> Any:
    """The member of diffusers' enum of backends with a name, None for None."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return None if name is None else AttentionBackendName(name)


def register_member(number: int) -> None:
    """Make diffusers call a group wherever a processor holds its member.

    Members are registered by the block: compiled code is valid for one size of diffusers' table, so that a table
    that grew with each patched model would recompile all others.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    for other in range(number // _BLOCK * _BLOCK, (number // _BLOCK + 1) * _BLOCK):
        if member(other) not in registry._backends:
            registry.register(member(other), supports_context_parallel=True)(_dispatched(other))


def unregister_members() -> None:
    """Leave diffusers' table as it was, unless some group still needs it."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    if any(getattr(item, "stock", Stock(False)).dispatched for item in operators.living()):
        return
    for ours in [m for m in registry._backends if str(m.value).startswith(_MEMBER)]:
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(ours, None)
        registry._supports_context_parallel.discard(ours.value)


@functools.lru_cache(maxsize=1024)
def _dispatched(number: int) -> Callable[..., torch.Tensor]:
    # The names of the parameters are how diffusers knows what to pass.
    def visattn_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        if _parallel_config is not None and degree(_parallel_config) > 1:
            if torch.compiler.is_compiling():
                raise ValueError("patterns under context parallelism do not run in compiled code: leave out compile()")
            group = operators.look_up(number)
            return group.attend_in_parallel(
                query, key, value, attn_mask, scale, enable_gqa, dropout_p, is_causal, _parallel_config
            )
        return call_group(number, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, True)

    return visattn_attention


@functools.lru_cache(maxsize=1024)
def _dispatch_without_backend(number: int) -> Callable[..., torch.Tensor]:
    """What stands for `dispatch_attention_fn` in processors that hold no backend."""
    dispatched = _dispatched(number)

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Any = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        return dispatched(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, parallel_config)

    return dispatch_attention_fn


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


@functools.lru_cache(maxsize=1024)
def _sdpa(number: int) -> Callable[..., torch.Tensor]:
    def visattn_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.ndim != 4:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = call_group(number, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, False)
        return out.transpose(1, 2)

    return visattn_attention


def call_group(
    number: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    dispatched: bool,
) -> torch.Tensor:
    """Attention of q, k, v [B, S, H, D] at a module of a group."""
    if torch.is_autocast_enabled(q.device.type):
        # SDPA would cast; a pattern has to see the same dtype.
        wanted = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(wanted), k.to(wanted), v.to(wanted)
    if not torch.compiler.is_compiling():
        group = operators.look_up(number)
        if torch._C._len_torch_function_stack() and skips_scores():
            return group.leave(
                q, k, v, mask, scale, grouped, dropout, causal, "diffusers skips its scores for guidance"
            )
        out, _ = group.attend(q, k, v, mask, scale, grouped, group.run.site, dropout, causal)
        return out
    if dropout or causal or not (mask is None or isinstance(mask, torch.Tensor)):
        return Stock(dispatched)(q, k, v, mask, scale, grouped, dropout, causal)
    return operators.patched_attention(q, k, v, mask, scale, grouped, number, operators.tensors_of(number))[0]


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
        ours: dict[str, Any] = {"dispatch_attention_fn": _dispatch_without_backend(number)}
    else:
        functional = types.SimpleNamespace(**vars(torch.nn.functional))
        functional.scaled_dot_product_attention = _sdpa(number)
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


def skips_scores() -> bool:
    """Whether diffusers is replacing torch's SDPA by its values, which guidance with perturbed attention does."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode as mode

    return any(isinstance(each, mode) for each in torch.overrides._get_current_function_mode_stack())


def _same(processor: Any) -> Any:
    return processor
