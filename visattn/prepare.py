"""Running checked calls; who runs one like an earlier one, and how, is found by one key and decided no second time."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad

from visattn.autocast import switched_off
from visattn.dispatch import Prepared, choose, choose_portable
from visattn.keep import CALL_BYTES, STORE
from visattn.operands import wide_dtype
from visattn.patterns import DynamicPattern
from visattn.patterns.kinds import PooledPattern, with_pooled_keys
from visattn.patterns.tailed import holding
from visattn.problem import Call, Problem
from visattn.registry import REGISTRY

# Types whose attributes are what they seem.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Types of a scale that is a value.
NUMBERS = frozenset((type(None), float, int))
_library: Any = torch._C

Results = tuple[torch.Tensor, torch.Tensor]
Grads = tuple[torch.Tensor | None, torch.Tensor | None]


def find(
    q: Any,
    k: Any,
    v: Any,
    pattern: Any,
    layout: Any,
    scale: Any,
    key_mask: Any,
    rpb: Any,
    backend: Any,
    lse: Any,
    precision: Any,
) -> tuple[Hashable | None, Prepared | None]:
    """The key of a call, None if nothing is kept of it, and what ran the last one with that key.

    A key is everything that decides how a call runs but the values of its tensors. Nothing is checked here: what is
    found has passed all checks. Nothing is kept of what tracers, modes and transforms see, and of tensors that are not
    torch's own.
    """
    if (
        torch.compiler.is_compiling()
        or _library._get_tracing_state() is not None
        or _library._len_torch_dispatch_stack()
        or _library._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None, None
    try:
        device = q.device
        if (
            type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or type(scale) not in NUMBERS
        ):  # fmt: skip
            return None, None
        kind = device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        others: Hashable = None
        learns = q.requires_grad or k.requires_grad or v.requires_grad
        if key_mask is not None or rpb is not None:
            others = _about(key_mask), _about(rpb)
            learns = learns or (rpb is not None and rpb.requires_grad)
        # `is_strict`, without a call.
        strict = _library._get_deterministic_algorithms() and not _library._get_deterministic_algorithms_warn_only()
        key = (
            find, pattern, layout, scale, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype,
            k.dtype, v.dtype, device, k.device, v.device, others, cast, backend, lse, precision,
            learns and torch.is_grad_enabled(), _library._get_cublas_allow_tf32(), strict, REGISTRY.version,
        )  # fmt: skip
        entry = STORE.find(key)
    except (AttributeError, TypeError, RuntimeError):
        return None, None
    return key, None if entry is None else entry.value


def _about(tensor: Any) -> Hashable:
    if tensor is None:
        return None
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def run_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str = "auto", portable: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose a backend for a checked call and run it; see `Backend.run`. With `portable` the name does not matter."""
    problem = Problem.of(q, k, v, call)
    chosen = choose_portable(problem) if portable else choose(problem, backend)
    if not q.shape[0]:
        return _of_no_samples(q, k, v, call)
    if isinstance(call.pattern, DynamicPattern) and call.pattern.has_tail and not chosen.adds_tail(q, k, v, call):
        return _with_tail(q, k, v, call, call.pattern, backend, portable)
    weight = call.parameters.get("pool_weight")
    with switched_off(q.device):
        k, v, key_mask = with_pooled_keys(call.pattern, k, v, call.key_mask, call.layout, weight)
        return chosen.run(q, k, v, replace(call, key_mask=key_mask))


def _with_tail(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, pattern: DynamicPattern, backend: str, portable: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A pattern that adds something to the output of an engine; the log-sum-exp is that of the engine."""
    front, layout = pattern.front, call.layout
    needs = pattern.rest == "slope"
    own = replace(call, pattern=front, lse=call.lse or needs, parameters={})
    choice = front.choose(q, k, layout, call.key_mask, call.scale) if needs else None
    with nullcontext() if choice is None else holding(front, choice):
        out, lse = run_call(q, k, v, own, backend, portable)
    with switched_off(q.device):
        more = pattern.tail(q, k, v, layout, call.key_mask, call.scale, lse, choice, call.parameters)
    more = torch.nn.functional.pad(more, (0, 0, 0, 0, layout.prefix, layout.suffix))
    return (out + more).to(out.dtype), lse if call.lse else None


def _of_no_samples(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty result of an empty batch, in whose graph every input has a part: gradients are empty or zero."""
    others = [t for t in (k, v, call.rpb, *call.parameters.values()) if t is not None]
    # Products, so that no gradient is another tensor under a second name.
    out = 1 * q + sum((0 * t).sum().to(q.dtype) for t in others)
    return out, out.sum(-1, dtype=wide_dtype(q))


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str, key: Hashable | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call, and keep what runs others with this key."""
    prepared = None if key is None else _prepare(q, k, v, call, backend, key)
    return run_call(q, k, v, call, backend) if prepared is None else prepared(q, k, v, call.key_mask, call.rpb)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str, key: Hashable
) -> Prepared | None:
    """Keep what runs calls with a key; None for calls of which nothing is kept."""
    pattern = call.pattern
    pools = isinstance(pattern, PooledPattern) and pattern.pool_shape(call.layout.grid) is not None
    if call.parameters or not q.shape[0] or pools:
        return None
    chosen = choose(Problem.of(q, k, v, call), backend)
    if isinstance(pattern, DynamicPattern) and pattern.has_tail and not chosen.adds_tail(q, k, v, call):
        return None
    prepared = chosen.prepare(q, k, v, call, lambda: STORE.weigh(key))
    if torch.is_autocast_enabled(q.device.type):
        prepared = _Cast(prepared, q.dtype, q.device.type)
    # Before it runs: what it comes to hold is counted there.
    STORE.put(key, prepared, CALL_BYTES)
    return prepared


class _Cast:
    """A call under autocast: in its dtype, and without autocast inside, see `visattn.autocast`."""

    def __init__(self, prepared: Prepared, dtype: torch.dtype, device: str) -> None:
        self.prepared, self._dtype, self._device = prepared, dtype, device

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = self._dtype
        q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
        # Not the context manager, which takes longer than the rest; what it does more is for leaving the outermost one.
        torch.set_autocast_enabled(self._device, False)
        try:
            return self.prepared(q, k, v, key_mask, rpb)
        finally:
            torch.set_autocast_enabled(self._device, True)


def run_like(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call as an earlier one like it, if there was any; see `Backend.run`."""
    key = None
    if not call.parameters:
        others = call.key_mask, call.rpb, backend, call.lse, call.precision
        key, prepared = find(q, k, v, call.pattern, call.layout, call.scale, *others)
        if prepared is not None:
            return prepared(q, k, v, call.key_mask, call.rpb)
    return run(q, k, v, call, backend, key)


def gradients_like(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str, results: Results, grads: Grads
) -> tuple[torch.Tensor, ...] | None:
    """The gradients of q, k and v from the results of a call that ran, None where only running it again gives them.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        call: The call, which asked for the log-sum-exp.
        backend: What the user asked for.
        results: Output [B, S, H, D] and log-sum-exp [B, S, H].
        grads: Their gradients, None for zeros.
    """
    others = call.key_mask, call.rpb, backend, call.lse, call.precision
    key, prepared = find(q, k, v, call.pattern, call.layout, call.scale, *others)
    if prepared is None and key is not None:
        prepared = _prepare(q, k, v, call, backend, key)
    gradients = getattr(prepared, "gradients", None)
    return None if gradients is None else gradients(q, k, v, call.key_mask, results, grads)
