"""Patched attention as operators of torch: torch.compile sees opaque nodes and traces no decision.

The step, the grid and the pattern are looked up when an operator runs, so that none of them is a constant of a
compiled graph.
"""

from __future__ import annotations

import itertools
import json
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attend import attention
from visattn.layout import Layout
from visattn.ops import autograd_inside_operator
from visattn.patterns import Pattern, parse
from visattn.pipelines.families.base import Sample, Seen
from visattn.pipelines.patch.masks import carry_bias, key_validity

# Operators take numbers, not objects: this is the only way from a number to its object. It keeps nothing alive.
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# Learnable parameters of the groups by number: compiled code takes them from here, as inputs of its graph.
_tensors: dict[int, list[torch.Tensor]] = {}
_lock = threading.Lock()
# Bytes of an encoded decision; a fixed size keeps the operator's shapes free of data.
DECISION_BYTES = 4096


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
            _tensors.pop(number, None)


def register_tensors(number: int, tensors: Iterable[torch.Tensor]) -> None:
    """Give the learnable parameters of a numbered group to compiled code."""
    _tensors[number] = list(tensors)


def tensors_of(number: int) -> list[torch.Tensor]:
    """The learnable parameters of a group."""
    return _tensors[number]


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
        layouts: Where the tokens sat, of each sample where they differ; empty if the stock attention ran.
        pattern: The pattern.
        backend: What the user asked for.
        mask_row: Row of a full mask that tells which keys are valid.
        stock: The attention without visattn.
        names: Names of the pattern's learnable parameters.
    """

    layouts: tuple[Layout, ...]
    pattern: Pattern
    backend: str
    mask_row: int | None
    stock: Stock
    names: tuple[str, ...] = ()

    def encode(self) -> torch.Tensor:
        """As bytes on the CPU: [DECISION_BYTES]."""
        where = [[layout.grid, layout.prefix, layout.suffix] for layout in self.layouts]
        data = json.dumps([where, str(self.pattern), self.backend, self.mask_row, self.names, *self.stock])
        text = data.encode()
        assert len(text) <= DECISION_BYTES, f"decision of {len(text)} bytes"
        return torch.frombuffer(bytearray(text.ljust(DECISION_BYTES)), dtype=torch.uint8)

    @classmethod
    def decode(cls, data: torch.Tensor) -> Decision:
        """The inverse of `encode`."""
        where, pattern, backend, mask_row, names, *stock = json.loads(bytes(data.numpy()))
        layouts = tuple(Layout(*each) for each in where)
        return cls(layouts, parse(pattern), backend, mask_row, Stock(*stock), tuple(names))


class Sequences(NamedTuple):
    """Queries, keys and values in the form that a pattern runs on.

    Attributes:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        keys: Valid keys, bool [B, S], or None for all.
        scale: Factor on the logits.
        channels: Channels of the output that count.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor | None
    scale: float
    channels: int

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor | None, scale: float | None
    ) -> Sequences:
        """From what `key_validity` found: valid keys, or a bias, which q and k then carry."""
        channels, factor = v.shape[3], float(q.shape[3] ** -0.5 if scale is None else scale)
        if keys is not None and keys.dtype != torch.bool:
            q, k, v = carry_bias(q, k, v, keys, factor)
            keys = None
        return cls(q, k, v, keys, factor, channels)

    def attend(
        self, pattern: Pattern, layouts: tuple[Layout, ...], backend: str, parameters: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Run a pattern: [B, S, H, channels]; with several layouts sample by sample."""
        if len(layouts) == 1:
            options: dict[str, Any] = {"scale": self.scale, "key_mask": self.keys, "backend": backend}
            options["parameters"] = parameters
            return attention(self.q, self.k, self.v, pattern, layouts[0], **options)[..., : self.channels]
        parts = [self.sample(i).attend(pattern, (layout,), backend, parameters) for i, layout in enumerate(layouts)]
        return torch.cat(parts)

    def sample(self, i: int) -> Sequences:
        """One sample, still as a batch."""
        at = slice(i, i + 1)
        keys = None if self.keys is None else self.keys[at]
        return self._replace(q=self.q[at], k=self.k[at], v=self.v[at], keys=keys)


@torch.library.custom_op("visattn::patched_attention", mutates_args=())
def patched_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k, v [B, S, H, D] at a module of a group; returns the output and the encoded decision."""
    owner = look_up(group)
    assert owner is not None, f"compiled code of group {group} outlives its patch"
    given = {n: t.detach().to(q.device) for n, t in zip(owner.parameters, parameters, strict=True)}
    out, decision = owner.attend(q, k, v, mask, scale, grouped, site=None, parameters=given)
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
    parameters: list[torch.Tensor],
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
    parameters: list[torch.Tensor],
) -> list[torch.Tensor]:
    made = Decision.decode(decision)
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v, *parameters)]
        if made.layouts:
            keys = key_validity(mask, q, made.mask_row)
            assert not isinstance(keys, str), keys
            sequences = Sequences.of(leaves[0], leaves[1], leaves[2], keys, scale)
            given = {n: t.to(q.device) for n, t in zip(made.names, leaves[3:], strict=True)}
            out = sequences.attend(made.pattern, made.layouts, made.backend, given)
        else:
            out = made.stock(leaves[0], leaves[1], leaves[2], mask, scale, grouped)
        # The stock attention uses no parameters.
        found = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in found]


@_patched_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *rest[-1])]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, mask, scale, grouped, _, parameters = inputs
    ctx.save_for_backward(q, k, v, mask, output[1], *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.rest = scale, grouped


def _attention_gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = _patched_attention_backward(grad, *saved[:5], *ctx.rest, list(saved[5:]))
    return *gradients[:3], None, None, None, None, gradients[3:]


patched_attention.register_autograd(_attention_gradients, setup_context=_save_attention)


@torch.library.custom_op("visattn::begin_forward", mutates_args=())
def begin_forward(
    latents: torch.Tensor,
    ids: torch.Tensor | None,
    grid: list[int],
    prefix: int,
    suffix: int,
    samples: list[int],
    why: str,
    run: int,
) -> torch.Tensor:
    """Tell a run that a forward begins; returns the latents, so that everything after depends on it.

    `samples` are the numbers of each `Sample`, one after the other.
    """
    owner = look_up(run)
    if owner is not None:
        size = owner.family.dims + 1
        each = [samples[at : at + size] for at in range(0, len(samples), size)]
        apart = tuple(Sample(tuple(numbers[:-1]), numbers[-1]) for numbers in each)
        owner.begin(Seen(tuple(grid), prefix, suffix, ids, why, apart), compiled=True)
    return latents.clone()


@begin_forward.register_fake
def _(
    latents: torch.Tensor,
    ids: torch.Tensor | None,
    grid: list[int],
    prefix: int,
    suffix: int,
    samples: list[int],
    why: str,
    run: int,
) -> torch.Tensor:
    return torch.empty_like(latents)


begin_forward.register_autograd(lambda ctx, grad: (grad, *[None] * 7))
