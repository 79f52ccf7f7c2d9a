"""Calls like an earlier one: who runs them, and how, is found by one key and decided no second time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.autograd import forward_ad

from visattn.dispatch import Call, Problem, choose, run_call
from visattn.keep import CALL_BYTES, STORE
from visattn.patterns.kinds import PooledPattern
from visattn.registry import REGISTRY

# Types whose attributes are what they seem.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Types of a scale that is a value.
NUMBERS = frozenset((type(None), float, int))
_library: Any = torch._C


def key_of(
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
) -> Hashable | None:
    """Everything that decides how a call runs but the values of its tensors, None for calls that nothing is kept of.

    Nothing is checked: a key is found again if a call with the same one has passed all checks. Nothing is kept of what
    tracers, modes and transforms see, under autocast, and of tensors that are not torch's own.
    """
    if (
        torch.compiler.is_compiling()
        or _library._get_tracing_state() is not None
        or _library._len_torch_dispatch_stack()
        or _library._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        device = q.device
        if (
            type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or type(scale) not in NUMBERS
            or torch.is_autocast_enabled(device.type)
        ):  # fmt: skip
            return None
        others: Hashable = None
        learns = q.requires_grad or k.requires_grad or v.requires_grad
        if key_mask is not None or rpb is not None:
            others = _about(key_mask), _about(rpb)
            learns = learns or (rpb is not None and rpb.requires_grad)
        key = (
            key_of, pattern, layout, scale, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype,
            k.dtype, v.dtype, device, k.device, v.device, others, backend, lse, learns and torch.is_grad_enabled(),
            _library._get_cublas_allow_tf32(), REGISTRY.version,
        )  # fmt: skip
        hash(key)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return key


def _about(tensor: Any) -> Hashable:
    if tensor is None:
        return None
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str, key: Hashable | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call, and keep what runs others with this key."""
    if key is None or call.parameters or not q.shape[0] or isinstance(call.pattern, PooledPattern):
        return run_call(q, k, v, call, backend)
    chosen = choose(Problem.of(q, k, v, call), backend)
    prepared = chosen.prepare(q, k, v, call, lambda: STORE.weigh(key))
    # Kept first: what it comes to hold is counted there.
    STORE.put(key, prepared, CALL_BYTES)
    return prepared(q, k, v, call.key_mask, call.rpb)
