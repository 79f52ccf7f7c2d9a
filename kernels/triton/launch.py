"""Launches of the kernels, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch

from visattn.kernels.triton import arguments
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.config import Config
from visattn.kernels.triton.hopper import launch as hopper_launch
from visattn.kernels.triton.lists.bias_grad import bias_gradients
from visattn.kernels.triton.lists.delta import deltas
from visattn.kernels.triton.lists.forward import attend
from visattn.kernels.triton.lists.key_grad import key_gradients
from visattn.kernels.triton.lists.positions import partners
from visattn.kernels.triton.lists.query_grad import query_gradients
from visattn.kernels.triton.start import Launch, launch, on, programs

# Launch configuration of the kernels without matrix products.
SMALL = Config(32, 1, 4, 1)

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]


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
        out, lse = forward(q, k, v, rpb, work, want_lse or any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, rpb, out, lse)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out, by_token(lse)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        """Delta pre-pass, then a kernel for each gradient that is wanted; no atomics, so deterministic."""
        q, k, v, rpb, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            bias = () if rpb is None else (rpb,)
            found = ctx.work.formula((q, k, v, *bias), (grad_out, grad_lse))
            return *found, *(None for _ in range(6 - len(found)))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        want_q, want_k, want_v, want_rpb = ctx.needs_input_grad[:4]
        grads = gradients((q, k, v, rpb), out, lse, grad_out, grad_lse, ctx.work, (want_q, want_k or want_v, want_rpb))
        return *grads, None, None


def by_token(lse: torch.Tensor | None) -> torch.Tensor | None:
    """The log-sum-exp [B, H, S] of a kernel as [B, S, H]."""
    return None if lse is None else lse.transpose(1, 2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the forward kernel that the configuration names: out [B, S, H, D], the log-sum-exp [B, H, S] or None."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if want_lse else None
    if not q.numel():
        return out, lse
    if work.configs["forward"].hopper:
        assert rpb is None, "launches() chooses the general kernel for a bias"
        hopper_launch.launch(q, k, v, out, lse, work)
        return out, lse
    tensors = {"q": q, "k": k, "v": v, "out": out, **work.changing("forward", q.device)}
    optional = {"lse": lse, "rpb": rpb, "key_mask": work.key_mask}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}

    def make() -> Launch:
        given = arguments.forward_arguments(q, k, v, rpb, out, lse, work)
        return _along_lists(attend, given, work.configs["forward"])

    work.starts.run(("forward", want_lse), tensors, make)
    return out, lse


def _along_lists(kernel: Any, given: dict[str, Any], config: Config) -> Launch:
    """The launch of a kernel that walks lists."""
    return Launch(kernel, programs(given), given, config.warps, config.stages)


def _key_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    work: Work,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the dK/dV kernel that the configuration names."""
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    if work.configs["key_grad"].hopper:
        hopper_launch.launch_key_gradients(q, k, v, grad_out, lse, delta, grad_k, grad_v, work)
        return grad_k, grad_v
    results = {"grad_k": grad_k, "grad_v": grad_v}

    def make() -> Launch:
        given = arguments.gradient_arguments("key_grad", q, k, v, rpb, grad_out, lse, delta, work) | results
        return _along_lists(key_gradients, given, work.configs["key_grad"])

    tensors = _changing("key_grad", q, k, v, rpb, grad_out, lse, delta, work) | results
    work.starts.run(("key_grad", grad_out.stride()), tensors, make)
    return grad_k, grad_v


def _changing(
    direction: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    work: Work,
) -> dict[str, torch.Tensor]:
    """The arguments of a gradient's kernel along lists that are other tensors in each call, without its results."""
    tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out, "lse": lse, "delta": delta}
    optional = {"rpb": rpb, "key_mask": work.key_mask}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    return tensors | work.changing(direction, q.device)


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
    _deltas(out, grad_out, grad_lse, delta, work)
    rest = (q, k, v, rpb, grad_out, lse, delta, work)
    if wanted[1]:
        grads[1], grads[2] = _key_gradients(*rest)
    if wanted[0]:
        grads[0] = _query_gradients(*rest)
    if wanted[2]:
        grads[3] = _bias_gradients(*rest)
    return grads


def _deltas(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor, work: Work
) -> None:
    """Run the pre-pass: the sum of out times its gradient for each query and head."""
    tensors = {"out": out, "grad_out": grad_out, "delta": delta}
    if grad_lse is not None:
        tensors["grad_lse"] = grad_lse

    def make() -> Launch:
        given = arguments.delta_arguments(out, grad_out, grad_lse, delta)
        grid = (-(-out.shape[1] // given["ROWS"]), out.shape[2], out.shape[0])
        return Launch(deltas, grid, given, SMALL.warps, SMALL.stages)

    work.starts.run(("delta", grad_out.stride(), None if grad_lse is None else grad_lse.stride()), tensors, make)


def _query_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    work: Work,
) -> torch.Tensor:
    """Run the dQ kernel."""
    grad_q = q.new_empty(q.shape)

    def make() -> Launch:
        given = arguments.gradient_arguments("query_grad", q, k, v, rpb, grad_out, lse, delta, work)
        return _along_lists(query_gradients, given | {"grad_q": grad_q}, work.configs["query_grad"])

    tensors = _changing("query_grad", q, k, v, rpb, grad_out, lse, delta, work) | {"grad_q": grad_q}
    work.starts.run(("query_grad", grad_out.stride()), tensors, make)
    return grad_q


def _bias_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    work: Work,
) -> torch.Tensor:
    """Run the kernel of the bias' gradient, which has a part for each sample."""
    assert rpb is not None
    partner = partners(work.pattern, work.layout, q.device)
    parts = rpb.new_empty((q.shape[0], *rpb.shape))
    given = arguments.bias_arguments(q, k, v, rpb, grad_out, lse, delta, partner, work) | {"grad_rpb": parts}
    with on(q.device):
        launch(bias_gradients, (rpb.shape[1], q.shape[2], q.shape[0]), given, SMALL.warps, SMALL.stages)
    return parts.sum(0)
