"""Causal linear attention in Triton: states between chunks of positions, products inside them, without atomics."""

from __future__ import annotations

from typing import Any

import torch

from visattn.kernels.linear.causal import plain_grid_attention
from visattn.kernels.linear.features import feature_map
from visattn.kernels.second_order import by_autograd
from visattn.kernels.triton import start
from visattn.kernels.triton.linear.attention import (
    Launch,
    Setting,
    Weights,
    gather_arguments,
    launches,
    linear_attention,
    readable,
    row_sums,
    run,
    summed,
)
from visattn.kernels.triton.linear.causal.arguments import (
    Steps,
    causal_launches,
    chunk_arguments,
    grad_arguments,
    read_arguments,
    state_arguments,
)
from visattn.kernels.triton.linear.causal.gather import gather_chunks, run_states
from visattn.kernels.triton.linear.causal.grad import chunk_gradients
from visattn.kernels.triton.linear.causal.read import read_chunks
from visattn.kernels.triton.linear.gather import gather
from visattn.kernels.unchanged import savable
from visattn.layout import Layout
from visattn.operands import repeated, widened


def causal_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    axis: int,
    rates: torch.Tensor | None,
    key_mask: torch.Tensor | None = None,
    feature: str = "elu",
) -> torch.Tensor:
    """The maths of `visattn.patterns.Linear` with a causal axis, in time linear in the tokens.

    Source: Qin et al., "Lightning Attention-2" (2024), section 3.

    Args:
        q: Queries [B, S, H, F], any strides; F is D unless features are given.
        k: Keys [B, S, Hkv, F] in q's dtype, H a multiple of Hkv.
        v: Values [B, S, Hkv, D]; next to given features they may be of another dtype.
        layout: The tokens.
        axis: The causal axis of the grid.
        rates: Exponents of the decay of each head, float32 [H]; None for no decay.
        key_mask: bool [B, S], True where a key counts; None means all.
        feature: phi: "elu" (elu + 1), "relu", or "given" where q and k are features already, not negative.

    Returns:
        [B, S, H, D] in v's dtype. A query with denominator 0 gives zeros.

    Raises:
        ValueError: If the feature is unknown, or there are more than 256 features or channels.
    """
    dtype, first, behind = v.dtype, layout.prefix, layout.prefix + layout.tokens
    q, k, v = readable(q, k, v, feature)
    setting = Setting(feature, bool(torch.backends.cuda.matmul.allow_tf32))
    steps = Steps.of(layout.grid, axis, q.shape[3], rates is not None)
    rates = q.new_zeros(q.shape[2], dtype=torch.float32) if rates is None else rates.contiguous()
    mask = None if key_mask is None else key_mask[:, first:behind].contiguous().view(torch.uint8)
    grid = [t[:, first:behind] for t in (q, k, v)]
    if behind - first == layout.length:
        return CausalLinearAttention.apply(*grid, mask, None, rates, steps, setting).to(dtype)
    mask_ends = None if key_mask is None else _ends(key_mask, first, behind)
    dense = _dense_state(_ends(k, first, behind), _ends(v, first, behind), mask_ends, feature, q.shape[2])
    out = CausalLinearAttention.apply(*grid, mask, dense, rates, steps, setting)
    # Dense tokens see all without decay.
    ends = linear_attention(_ends(q, first, behind), k, v, key_mask, feature)
    return torch.cat([ends[:, :first], out, ends[:, first:]], 1).to(dtype)


def _ends(x: torch.Tensor, first: int, behind: int) -> torch.Tensor:
    """The tokens before and behind the grid."""
    return torch.cat([x[:, :first], x[:, behind:]], 1)


def _dense_state(
    k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, feature: str, heads: int
) -> torch.Tensor:
    """State and sums of dense keys, float32 [B, H, F * D + F]; there are few of them."""
    k = repeated(feature_map(k, feature), heads)
    if key_mask is not None:
        k = k * key_mask[:, :, None, None]
    state = torch.einsum("bshf,bshd->bhfd", k, repeated(widened(v), heads))
    return torch.cat([state.flatten(2), k.sum(1)], 2)


def _states(given: dict[str, Any], launch: Launch, dense: torch.Tensor | None, steps: Steps) -> torch.Tensor:
    """Gather chunks and run their states: [B, H, chunks, F * D + F]."""
    heads, parts = given["heads"], given["states"]
    programs = parts.shape[0] * heads * steps.chunks * given["splits"] * given["blocks"]
    start.launch_like(gather_chunks, (programs,), given, launch.warps, launch.stages)
    states = parts.squeeze(3) if given["splits"] == 1 else parts.sum(3)
    more = state_arguments(states, dense, given["rates"], steps, given["REVERSE"])
    start.launch_like(run_states, (parts.shape[0] * heads * more["blocks"],), more, 4, None)
    return states


def _rows(kernel: Any, given: dict[str, Any], launch: Launch) -> None:
    """Start a kernel with a program for each block of rows, and of features where those are blocked."""
    programs = len(given["states"]) * given["heads"] * given["chunks"] * given["tiles"]
    if kernel is chunk_gradients:
        programs *= -(-given["FEATURES"] // launch.features)
    start.launch_like(kernel, (programs,), given, launch.warps, launch.stages)


class CausalLinearAttention(torch.autograd.Function):
    """Causal linear attention of a grid with its own backward; all inputs have contiguous channels."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        dense: torch.Tensor | None,
        rates: torch.Tensor,
        steps: Steps,
        setting: Setting,
    ) -> torch.Tensor:
        """States before all chunks, then every query reads them and its chunk."""
        ctx.steps, ctx.setting = steps, setting
        if not q.numel() or not v.numel():
            ctx.save_for_backward(q, k, v, savable(key_mask), dense, rates, None, None, None)
            return v.new_zeros((*q.shape[:3], v.shape[3]))
        table = causal_launches(q.dtype, q.shape[3], v.shape[3])
        with start.on(q.device):
            states = _forward_states(k, v, key_mask, dense, rates, steps, setting, table["gather_chunks"])
            launch = table["read_chunks"]
            given = read_arguments(
                q, k, v, states, _beside(dense, steps), key_mask, None, rates, steps, setting, launch, v.dtype
            )
            _rows(read_chunks, given, launch)
        out = given["out"]
        ctx.save_for_backward(q, k, v, savable(key_mask), dense, rates, out, given["den"], given["peak"])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """States are computed again: they may be as large as the inputs."""
        q, k, v, key_mask, dense, rates, out, den, peak = ctx.saved_tensors
        steps, setting = ctx.steps, ctx.setting
        if torch.is_grad_enabled():
            shown = None if key_mask is None else key_mask.bool()
            plain = by_autograd(
                lambda q, k, v, dense: plain_grid_attention(
                    q, k, v, shown, dense, rates, steps.positions, steps.inner, setting.feature
                )
            )
            own = plain((q, k, v, dense), (grad_out,))
            return *own[:3], None, own[3], None, None, None
        if out is None:
            made = [None if t is None else torch.zeros_like(t) for t in (q, k, v, dense)]
            return *made[:3], None, made[3], None, None, None
        table = causal_launches(q.dtype, q.shape[3], v.shape[3])
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        want_q, want_k, want_v, _, want_dense = ctx.needs_input_grad[:5]
        grads: list[torch.Tensor | None] = [None] * 8
        weights, launch, heads = Weights(den, row_sums(out, grad_out), peak), table["chunk_grad"], q.shape[2]
        with start.on(q.device):
            if want_q:
                states = _forward_states(k, v, key_mask, dense, rates, steps, setting, table["gather_chunks"])
                given = grad_arguments(
                    q, grad_out, v, k, states, _beside(dense, steps), key_mask, weights, rates, False, steps, setting,
                    launch,
                )  # fmt: skip
                _rows(chunk_gradients, given, launch)
                grads[0] = given["grad_x"]
            if want_k or want_v:
                own = table["gather_chunks_grad"]
                given = chunk_arguments(q, grad_out, None, weights, heads, rates, steps, setting, own)
                states = _states(given, own, None, steps)
            if want_k:
                given = grad_arguments(
                    k, v, grad_out, q, states, None, key_mask, weights, rates, True, steps, setting, launch
                )
                _rows(chunk_gradients, given, launch)
                grads[1] = _shared(given["grad_x"], k)
            if want_v:
                own = table["read_chunks"]
                given = read_arguments(
                    k, q, grad_out, states, None, key_mask, weights, rates, steps, setting, own, v.dtype
                )
                _rows(read_chunks, given, own)
                grads[2] = _shared(given["out"], v)
            if want_dense:
                own = launches(q.dtype, q.shape[3], v.shape[3])["gather_grad"]
                given = gather_arguments(q, grad_out, None, weights, setting, own)
                run(gather, given, own)
                grad_state, grad_sums = summed(given, 1)
                grads[4] = torch.cat([grad_state.flatten(2), grad_sums], 2)
        return tuple(grads)


def _forward_states(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    dense: torch.Tensor | None,
    rates: torch.Tensor,
    steps: Steps,
    setting: Setting,
    launch: Launch,
) -> torch.Tensor:
    """What queries read: where a chunk is one position, its own state with what dense keys leave."""
    given = chunk_arguments(k, v, key_mask, None, len(rates), rates, steps, setting, launch)
    return _states(given, launch, None if steps.products else dense, steps)


def _beside(dense: torch.Tensor | None, steps: Steps) -> torch.Tensor | None:
    """What dense keys leave, where the states do not have it: those fade on their way through a chunk."""
    return dense if steps.products else None


def _shared(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradients of query heads that share a key head added up."""
    return grad if grad.shape[2] == x.shape[2] else grad.unflatten(2, (x.shape[2], -1)).sum(3)
