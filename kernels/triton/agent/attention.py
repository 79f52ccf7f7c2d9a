"""Agent attention in Triton: agents gather from splits of all keys, then all queries read from the agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from visattn.kernels.second_order import by_autograd
from visattn.kernels.triton import start
from visattn.kernels.triton.agent.attend import attend_run
from visattn.kernels.triton.agent.combine import combine
from visattn.kernels.triton.arguments import LOG2E, precision, strides, unit
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.splits import splits_of
from visattn.kernels.unchanged import savable
from visattn.operands import in_rows

# Programs of `attend_run` that run at once on a multiprocessor: splits are to fill the GPU once.
RESIDENT = 4
# Queries of a program of `combine`.
COMBINED = 16


class Launch(NamedTuple):
    """How `attend_run` is launched.

    Attributes:
        rows: Queries of a program.
        columns: Keys of a step.
        warps: Warps per program.
        stages: Steps in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def launch_of(dtype: torch.dtype, head_dim: int) -> Launch:
    """The launch for inputs of a dtype and head dim; no architecture needs another."""
    width = block_dim(head_dim)
    if dtype == torch.float32:
        return Launch(32 if width <= 64 else 16, 16 if width == 32 else 32, 4, 1)
    return Launch(64, 64 if 32 < width <= 128 else 32, 4 if width <= 128 else 8, 1 if width == 32 else 2)


class Setting(NamedTuple):
    """What a call asks for besides its tensors.

    Attributes:
        scale: Factor on both logits.
        tf32: Whether float32 products may round their factors to tf32.
        again: The same attention of (q, agents, k, v, key mask, agent mask, scale) in torch, which the backward
            differentiates.
    """

    scale: float
    tf32: bool
    again: Callable[..., torch.Tensor]


def run_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    tf32: bool,
    split: bool,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `attend_run`, and its results."""
    batch, queries, heads, dim = q.shape
    keys, step = k.shape[1], unit(q, k, v)
    chunk, splits = keys, 1
    if split:
        chunk, splits = splits_of(keys, batch * heads * -(-queries // launch.rows), launch.columns, RESIDENT, q.device)
    parts = (batch, heads, splits, queries)
    return {
        "q": q, "k": k, "v": v, "key_mask": q if key_mask is None else key_mask,
        "out": q.new_empty((*parts, dim), dtype=torch.float32) if split else q.new_empty(q.shape),
        "lse": q.new_empty(parts, dtype=torch.float32) if split else q,
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        "scale": scale * LOG2E, "heads": heads, "group": heads // k.shape[2],
        "queries": queries, "keys": keys, "chunk": chunk, "splits": splits,
        "HEAD_DIM": dim, "BLOCK_DIM": block_dim(dim), "ROWS": launch.rows, "COLUMNS": launch.columns, "UNIT": step,
        "KEY_MASK": key_mask is not None, "SPLIT": split,
        "PRECISION": precision(q.dtype, tf32),
    }  # fmt: skip


def combine_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `combine` after `attend_run` with these arguments, and its result."""
    q = given["q"]
    return {
        "parts": given["out"], "lse": given["lse"], "out": q.new_empty(q.shape),
        **{name: given[name] for name in ("heads", "queries", "splits", "HEAD_DIM", "BLOCK_DIM")},
        "ROWS": COMBINED,
    }  # fmt: skip


def _run(given: dict[str, Any], launch: Launch) -> torch.Tensor:
    programs = given["q"].shape[0] * given["heads"] * -(-given["queries"] // launch.rows) * given["splits"]
    start.launch_like(attend_run, (programs,), given, launch.warps, launch.stages)
    return given["out"]


class AgentAttention(torch.autograd.Function):
    """Agent attention without biases; its backward runs torch's form again and differentiates that."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        agents: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        agent_mask: torch.Tensor | None,
        setting: Setting,
    ) -> torch.Tensor:
        """Gather in splits, combine, read."""
        ctx.save_for_backward(q, agents, k, v, savable(key_mask), savable(agent_mask))
        ctx.setting = setting
        if not q.numel():
            return q.new_empty(q.shape)
        shown, there = (None if t is None else t.contiguous().view(torch.uint8) for t in (key_mask, agent_mask))
        launch, scale, tf32 = launch_of(q.dtype, q.shape[3]), setting.scale, setting.tf32
        with start.on(q.device):
            given = run_arguments(agents, k, v, shown, scale, tf32, True, launch)
            _run(given, launch)
            merge = combine_arguments(given)
            programs = q.shape[0] * q.shape[2] * -(-given["queries"] // COMBINED)
            start.launch_like(combine, (programs,), merge, 4, 1)
            return _run(run_arguments(q, agents, merge["out"], there, scale, tf32, False, launch), launch)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, agents, k and v."""
        *inputs, key_mask, agent_mask = ctx.saved_tensors
        again = by_autograd(lambda *tokens: ctx.setting.again(*tokens, key_mask, agent_mask, ctx.setting.scale))
        return *again(inputs, (grad_out,)), None, None, None


def agent_attention(
    q: torch.Tensor,
    agents: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    agent_mask: torch.Tensor | None,
    scale: float,
    again: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """softmax(scale q A^T) softmax(scale A k^T) v through agents A.

    Args:
        q: Queries [B, S, H, D], any strides.
        agents: Agents [B, n, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        key_mask: bool [B, S], True where a key may be attended, or None.
        agent_mask: bool [B, n], True for agents that exist, or None.
        scale: Factor on both logits.
        again: See `Setting`.

    Returns:
        [B, S, H, D]. A sample without any visible key or any agent gives zeros.
    """
    q, agents, k, v = (in_rows(t) for t in (q, agents, k, v))
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
        q, agents, k, v = (t.float() for t in (q, agents, k, v))
    setting = Setting(scale, bool(torch.backends.cuda.matmul.allow_tf32), again)
    return AgentAttention.apply(q, agents, k, v, key_mask, agent_mask, setting).to(dtype)
