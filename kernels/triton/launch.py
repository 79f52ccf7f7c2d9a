"""Launches of the kernels, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch

from visattn.kernels.triton import arguments, start
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.config import Config
from visattn.kernels.triton.hopper import launch as hopper_launch
from visattn.kernels.triton.lists.bias_grad import bias_gradients
from visattn.kernels.triton.lists.delta import deltas
from visattn.kernels.triton.lists.forward import attend
from visattn.kernels.triton.lists.key_grad import key_gradients
from visattn.kernels.triton.lists.positions import partners
from visattn.kernels.triton.lists.query_grad import query_gradients

# Launch configuration of the kernels without matrix products.
SMALL = Config(32, 1, 4, 1)

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]


def _launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], config: Config) -> None:
    start.launch(kernel, grid, given, config.warps, config.stages)


class TileAttention(torch.autograd.Function):
    """Attention along tile lists: out [B, S, H, D] and the natural log-sum-exp [B, S, H] in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rpb: torch.Tensor | None,
        work: Work,
        want_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the forward kernel; rpb is float32 [H, entries]."""
        batch, length, heads, _ = q.shape
        out = q.new_empty(q.shape)
        lse = None
        if want_lse or any(ctx.needs_input_grad):
            lse = q.new_empty((batch, heads, length), dtype=torch.float32)
        if q.numel():
            with start.on(q.device):
                _attend(q, k, v, rpb, out, lse, work)
        ctx.save_for_backward(q, k, v, rpb, out, lse)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out, None if lse is None else lse.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        """Delta pre-pass, then a kernel for each gradient that is wanted; no atomics, so deterministic."""
        q, k, v, rpb, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        want_q, want_k, want_v, want_rpb = ctx.needs_input_grad[:4]
        grads = gradients((q, k, v, rpb), out, lse, grad_out, grad_lse, ctx.work, (want_q, want_k or want_v, want_rpb))
        return *grads, None, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    work: Work,
) -> None:
    """Start the forward kernel that the configuration names."""
    launch = work.configs["forward"]
    if launch.hopper:
        assert rpb is None, "engine.launches chooses the general kernel for a bias"
        hopper_launch.launch(q, k, v, out, lse, work)
    else:
        given = arguments.forward_arguments(q, k, v, rpb, out, lse, work)
        _launch(attend, start.programs(given), given, launch)


def _key_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    work: Work,
) -> None:
    """Start the dK/dV kernel that the configuration names."""
    launch = work.configs["key_grad"]
    if launch.hopper:
        hopper_launch.launch_key_gradients(q, k, v, grad_out, lse, delta, grad_k, grad_v, work)
    else:
        given = arguments.gradient_arguments("key_grad", q, k, v, rpb, grad_out, lse, delta, work)
        given |= {"grad_k": grad_k, "grad_v": grad_v}
        _launch(key_gradients, start.programs(given), given, launch)


def gradients(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    work: Work,
    wanted: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and rpb, None where they are not wanted.

    Args:
        inputs: q, k, v and rpb of the forward.
        out: Its result [B, S, H, D], contiguous.
        lse: Its log-sum-exp, contiguous as [B, H, S].
        grad_out: Gradient of `out`.
        grad_lse: Gradient of the log-sum-exp [B, S, H], or None.
        work: The rest of the call.
        wanted: Whether the gradients of q, of k and v, and of rpb are wanted.
    """
    q, k, v, rpb = inputs
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if not q.numel():
        return [None if t is None else torch.zeros_like(t) for t in inputs]
    delta = torch.empty_like(lse)
    grads: list[torch.Tensor | None] = [None, None, None, None]
    with start.on(q.device):
        given = arguments.delta_arguments(out, grad_out, grad_lse, delta)
        _launch(deltas, (-(-q.shape[1] // given["ROWS"]), q.shape[2], q.shape[0]), given, SMALL)
        rest = (q, k, v, rpb, grad_out, lse, delta)
        if wanted[1]:
            grads[1], grads[2] = k.new_empty(k.shape), v.new_empty(v.shape)
            _key_gradients(*rest, grads[1], grads[2], work)
        if wanted[0]:
            grads[0] = q.new_empty(q.shape)
            given = arguments.gradient_arguments("query_grad", *rest, work) | {"grad_q": grads[0]}
            _launch(query_gradients, start.programs(given), given, work.configs["query_grad"])
        if wanted[2]:
            assert rpb is not None
            partner = partners(work.pattern, work.layout, q.device)
            given = arguments.bias_arguments(q, k, v, rpb, grad_out, lse, delta, partner, work)
            parts = rpb.new_empty((q.shape[0], *rpb.shape))
            given["grad_rpb"] = parts
            _launch(bias_gradients, (rpb.shape[1], q.shape[2], q.shape[0]), given, SMALL)
            grads[3] = parts.sum(0)
    return grads
