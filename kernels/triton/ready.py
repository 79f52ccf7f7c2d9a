"""Calls of `attention` on tile lists, with and without gradients, along prepared kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from visattn.kernels.second_order import Tensors, of_lists
from visattn.kernels.triton.arguments import Routed
from visattn.kernels.triton.choosing.listed import DynamicLists
from visattn.kernels.triton.choosing.skipped import SkippingLists
from visattn.kernels.triton.prepared import Kernels
from visattn.kernels.triton.routing.router import Chosen
from visattn.kernels.unchanged import savable
from visattn.patterns import RoutedPattern
from visattn.problem import Call


class TileAttention(torch.autograd.Function):
    """Attention along tile lists: out [B, S, H, D] and, if it is wanted, the natural log-sum-exp [B, S, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rpb: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        kernels: Kernels,
        formula: Formula,
        want_lse: bool,
        routed: Routed | None,
    ) -> Any:
        """Run the forward kernel; rpb is float32 [H, entries]."""
        out, lse = kernels.forward(q, k, v, key_mask, rpb, True, routed)
        # At each forward: a call less where there is no mask.
        mask = None if key_mask is None else savable(key_mask)
        ctx.save_for_backward(q, k, v, rpb, out, lse, mask)
        ctx.rest = kernels, formula, routed
        ctx.set_materialize_grads(False)
        assert lse is not None
        return (out, lse.transpose(1, 2)) if want_lse else out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None = None) -> tuple[Any, ...]:
        """The gradients; by the formula where somebody differentiates them again."""
        *saved, key_mask = ctx.saved_tensors
        kernels, formula, routed = ctx.rest
        if torch.is_grad_enabled():
            if isinstance(routed, DynamicLists) and routed.rest is not None:
                raise NotImplementedError(
                    f"second derivatives of {kernels.pattern} are not in the Triton kernels: call attention with "
                    "backend='tiles' or 'reference'"
                )
            bias = () if saved[3] is None else (saved[3],)
            found = formula((*saved[:3], *bias), (grad_out, grad_lse), key_mask, routed)
            return *found, *(None for _ in range(9 - len(found)))
        if grad_out is None or grad_out.stride(-1) != 1:
            grad_out = _by_channels(grad_out, saved[4])
        want_q, want_k, want_v, want_rpb = ctx.needs_input_grad[:4]
        wanted = want_q, want_k or want_v, want_rpb
        return *kernels.backward(saved, grad_out, grad_lse, wanted, key_mask, routed), None, None, None, None, None


def _by_channels(grad_out: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """The gradient of an output as the kernels read it: its channels are contiguous."""
    if grad_out is None:
        return torch.zeros_like(out)
    return grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()


def learned(*given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`TileAttention` of its arguments; the log-sum-exp is None unless it is wanted."""
    found = TileAttention.apply(*given)
    return found if isinstance(found, tuple) else (found, None)


class Formula:
    """Gradients that can be differentiated again, for (q, k, v[, rpb]) and (out, log-sum-exp).

    Args:
        call: The call. Its scale may be negative: then q is what the kernels got, with its sign turned.
    """

    def __init__(self, call: Call) -> None:
        # What this holds lives as long as the graph, so no tensors.
        self._call = replace(call, key_mask=None, rpb=None, parameters={})

    def __call__(
        self, inputs: Tensors, grads: Tensors, key_mask: torch.Tensor | None, routed: Routed | None
    ) -> Tensors:
        """See `second_order.of_lists`."""
        # Means that are added up in another order could choose otherwise.
        choice = routed.choice() if isinstance(routed, Chosen) else None
        formula = of_lists(replace(self._call, key_mask=key_mask), choice)
        if self._call.scale >= 0:
            return formula(inputs, grads)
        q, *rest = inputs
        assert q is not None
        grad_q, *others = formula((-q, *rest), grads)
        assert grad_q is not None
        return -grad_q, *others


class Ready:
    """A call of `attention` whose tensors the kernels take as they are.

    Args:
        kernels: Its kernels.
        call: The first call.
        learns: Whether autograd sees it.
    """

    def __init__(self, kernels: Kernels, call: Call, learns: bool) -> None:
        self.kernels, self._lse, self._learns = kernels, call.lse, learns
        self._routed = isinstance(call.pattern, RoutedPattern)
        self._formula = Formula(call)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and log-sum-exp, see `Backend.run`."""
        routed = self.kernels.lists(q, k, v, key_mask, self._learns) if self._routed else None
        if self._learns:
            return learned(q, k, v, rpb, key_mask, self.kernels, self._formula, self._lse, routed)
        out, lse = self.kernels.forward(q, k, v, key_mask, rpb, self._lse, routed)
        return out, None if lse is None else lse.transpose(1, 2)

    def gradients(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        results: tuple[torch.Tensor, torch.Tensor],
        grads: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v, from output [B, S, H, D] and log-sum-exp [B, S, H] and their gradients."""
        out, lse = results
        routed = self.kernels.lists(q, k, v, key_mask, True) if self._routed else None
        assert not isinstance(routed, SkippingLists), "with gradients lists are without what is passed over"
        saved = q, k, v, None, out, lse.transpose(1, 2).contiguous()
        wanted = True, True, False
        return self.kernels.backward(saved, _by_channels(grads[0], out), grads[1], wanted, key_mask, routed)[:3]
