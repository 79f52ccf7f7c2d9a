"""Patched attention as operators of torch: torch.compile sees opaque nodes and traces no decision.

The step, the grid and the pattern are looked up when an operator runs, so that none of them is a constant of a
compiled graph.
"""

from __future__ import annotations

import itertools
import json
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.dispatch import Call
from visattn.layout import Layout
from visattn.ops import _autograd_inside_operator as autograd_inside_operator
from visattn.ops import recompute_gradients
from visattn.patterns import Pattern, parse
from visattn.pipelines.families.base import Seen

# Operators take numbers, not objects: this is the only way from a number to its object. It keeps nothing alive.
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_lock = threading.Lock()
# Bytes of an encoded decision; a fixed size keeps the operator's shapes free of data.
DECISION_BYTES = 1024


def register(item: Any) -> int:
    """Give an object the smallest free number; a compiled graph that has it stays valid for the next owner."""
    with _lock:
        number = next(i for i in itertools.count() if i not in _objects)
        _objects[number] = item
    return number


def release(number: int, item: Any) -> None:
    """Free the number of an object."""
    with _lock:
        if _objects.get(number) is item:
            del _objects[number]


def look_up(number: int) -> Any:
    """The object with a number, None if it is gone."""
    return _objects.get(number)


def living() -> list[Any]:
    """Every object that has a number."""
    with _lock:
        return list(_objects.values())


class Stock(NamedTuple):
    """The attention that a processor would run without visattn.

    Attributes:
        dispatched: Whether through diffusers' `dispatch_attention_fn` rather than torch's SDPA.
        backend: Name of the diffusers backend that the user chose, or None.
    """

    dispatched: bool
    backend: str | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        grouped: bool,
        dropout: float = 0.0,
        causal: bool = False,
        parallel: Any = None,
    ) -> torch.Tensor:
        """Attention of q, k, v [B, S, H, D] as stock diffusers computes it."""
        if not self.dispatched:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2)
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        backend = None if self.backend is None else AttentionBackendName(self.backend)
        return dispatch_attention_fn(
            q, k, v, mask, dropout, causal, scale, grouped, backend=backend, parallel_config=parallel
        )


class Decision(NamedTuple):
    """What a forward ran, in a form that its backward can carry.

    Attributes:
        layout: Where the tokens sat, None if the stock attention ran.
        pattern: The pattern.
        backend: What the user asked for.
        mask_row: Row of a full mask that tells which keys are valid.
        stock: The attention without visattn.
    """

    layout: Layout | None
    pattern: Pattern
    backend: str
    mask_row: int | None
    stock: Stock

    def encode(self) -> torch.Tensor:
        """As bytes on the CPU: [DECISION_BYTES]."""
        where = None if self.layout is None else [self.layout.grid, self.layout.prefix, self.layout.suffix]
        text = json.dumps([where, str(self.pattern), self.backend, self.mask_row, *self.stock]).encode()
        assert len(text) <= DECISION_BYTES, f"decision of {len(text)} bytes"
        return torch.frombuffer(bytearray(text.ljust(DECISION_BYTES)), dtype=torch.uint8)

    @classmethod
    def decode(cls, data: torch.Tensor) -> Decision:
        """The inverse of `encode`."""
        where, pattern, backend, mask_row, *stock = json.loads(bytes(data.numpy()))
        layout = None if where is None else Layout(*where)
        return cls(layout, parse(pattern), backend, mask_row, Stock(*stock))


def key_validity(mask: torch.Tensor | None, q: torch.Tensor, row: int | None) -> torch.Tensor | str | None:
    """Which keys a mask of attention leaves valid: bool [B, S], None for all, or why a mask says more than that.

    Args:
        mask: What stock attention gets: broadcasts to [B, H, S, S]; True or 0 keeps a pair.
        q: Queries [B, S, H, D].
        row: Row of a full mask that holds the validity of the keys, None if there is no such row.
    """
    if mask is None:
        return None
    shape = list(mask.shape)
    if mask.ndim != 4 or shape[1] != 1 or shape[0] not in (1, q.shape[0]) or shape[3] != q.shape[1]:
        return f"its mask {shape} is not a mask of keys"
    if shape[2] != 1 and row is None:
        return f"its mask {shape} differs from query to query"
    keys = mask[:, 0, 0 if shape[2] == 1 or row is None else row]
    if keys.dtype != torch.bool:
        valid = keys == 0
        if not bool((valid | (keys < -1e3)).all()):
            return f"its mask {shape} is a bias, not a mask of keys"
        keys = valid
    if keys.device.type == "cpu" and bool(keys.all()):
        return None
    return keys.expand(q.shape[0], -1)


@torch.library.custom_op("visattn::patched_attention", mutates_args=())
def patched_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k, v [B, S, H, D] at a module of a group; returns the output and the encoded decision."""
    owner = look_up(group)
    assert owner is not None, f"compiled code of group {group} outlives its patch"
    out, decision = owner.attend(q, k, v, mask, scale, grouped, site=None)
    return out.contiguous(), decision.encode()


@patched_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty(DECISION_BYTES, dtype=torch.uint8)


@torch.library.custom_op("visattn::patched_attention_backward", mutates_args=())
def _patched_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    decision: torch.Tensor,
    scale: float | None,
    grouped: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = Decision.decode(decision)
    if made.layout is not None:
        keys = key_validity(mask, q, made.mask_row)
        assert not isinstance(keys, str), keys
        call = Call(made.pattern, made.layout, q.shape[-1] ** -0.5 if scale is None else scale, keys)
        dq, dk, dv, *_ = recompute_gradients(grad, grad.new_empty(0), q, k, v, call, made.backend)
        return dq, dk, dv
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = made.stock(leaves[0], leaves[1], leaves[2], mask, scale, grouped)
        dq, dk, dv = (g.contiguous() for g in torch.autograd.grad(out, leaves, grad))
    return dq, dk, dv


@_patched_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, mask, scale, grouped, _ = inputs
    ctx.save_for_backward(q, k, v, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.rest = scale, grouped


def _attention_gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = _patched_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *gradients, None, None, None, None


patched_attention.register_autograd(_attention_gradients, setup_context=_save_attention)


@torch.library.custom_op("visattn::begin_forward", mutates_args=())
def begin_forward(
    latents: torch.Tensor, ids: torch.Tensor | None, grid: list[int], prefix: int, suffix: int, why: str, run: int
) -> torch.Tensor:
    """Tell a run that a forward begins; returns the latents, so that everything after depends on it."""
    owner = look_up(run)
    if owner is not None:
        owner.begin(Seen(tuple(grid), prefix, suffix, ids, why), compiled=True)
    return latents.clone()


@begin_forward.register_fake
def _(
    latents: torch.Tensor, ids: torch.Tensor | None, grid: list[int], prefix: int, suffix: int, why: str, run: int
) -> torch.Tensor:
    return torch.empty_like(latents)


begin_forward.register_autograd(lambda ctx, grad: (grad, None, None, None, None, None, None))
