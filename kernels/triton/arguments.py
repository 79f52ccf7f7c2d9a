"""The arguments of the kernels for a problem: one place for launches and for ahead-of-time compilation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.kernels.second_order import Formula
from visattn.kernels.triton.boxes import tiled
from visattn.kernels.triton.config import Config, block_dim
from visattn.kernels.triton.lists.positions import positions
from visattn.kernels.triton.lists.program import Program, program
from visattn.kernels.triton.routes import routed_program
from visattn.kernels.triton.start import Starts
from visattn.layout import Layout
from visattn.patterns import Pattern, RoutedPattern
from visattn.plans import TilePlan

LOG2E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class Work:
    """What a call asks for besides q, k, v and rpb.

    Attributes:
        pattern: The pattern.
        layout: The tokens.
        scale: Factor on the logits, not negative.
        key_mask: uint8 [B, S + extra], or None.
        tf32: Whether float32 products may round their factors to tf32.
        configs: Launch configuration of each direction.
        starts: The kernels of calls like this one.
        routes: What a routed pattern chose, by plan: int64 [B, grid query tiles, n].
        formula: Gradients that can be differentiated again, for (q, k, v[, rpb]) and (out, log-sum-exp).
    """

    pattern: Pattern
    layout: Layout
    scale: float
    key_mask: torch.Tensor | None
    tf32: bool
    configs: dict[str, Config]
    starts: Starts
    routes: dict[TilePlan, torch.Tensor] = field(default_factory=dict)
    formula: Formula | None = None

    def plan(self, direction: str) -> TilePlan:
        """The tiles of a kernel."""
        return plan_of(self.pattern, self.layout, direction, self.configs[direction])

    def program(self, direction: str, device: torch.device) -> Program:
        """The lists that a kernel walks."""
        plan, by_keys = self.plan(direction), direction == "key_grad"
        if isinstance(self.pattern, RoutedPattern):
            return routed_program(plan, by_keys, self.routes[plan])
        return program(plan, by_keys, self.configs[direction].per_step, device)

    def changing(self, direction: str, device: torch.device) -> dict[str, torch.Tensor]:
        """The lists that differ from call to call: those of a routed pattern."""
        if not isinstance(self.pattern, RoutedPattern):
            return {}
        run = self.program(direction, device)
        return {"bounds": run.bounds, "bases": run.bases, "mask_ids": run.mask_ids}


def plan_of(pattern: Pattern, layout: Layout, direction: str, launch: Config) -> TilePlan:
    """The tiles of a kernel: its rows are queries, but for dK/dV keys."""
    slots = (launch.tile, launch.rows) if direction == "key_grad" else (launch.rows, launch.tile)
    return tiled(pattern, layout, *slots)


def unit(*tensors: torch.Tensor) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride but the last, so that the kernels know alignments."""
    strides = [s for t in tensors for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    return next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in strides))


def strides(name: str, x: torch.Tensor, unit: int) -> dict[str, int]:
    """Strides of batch, token and head in units; those of axes of length 1 do not matter."""
    axes = zip(("batch", "token", "head"), x.stride()[:3], x.shape[:3], strict=True)
    return {f"{name}_{axis}": 0 if n == 1 else stride // unit for axis, stride, n in axes}


def head_arguments(q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
    """Sizes that every kernel over heads takes."""
    return {"heads": q.shape[2], "group": q.shape[2] // k.shape[2], "length": q.shape[1]}


def list_arguments(run: Program, work: Work, column_positions: bool, pairs: int) -> dict[str, Any]:
    """The lists of a program, and the positions if there is a bias."""
    layout = run.column_tiling.layout
    arguments: dict[str, Any] = {
        "tokens": run.tokens,
        "bounds": run.bounds,
        "bases": run.bases,
        "mask_ids": run.mask_ids,
        "offsets": run.offsets,
        "masks": run.masks,
        "bounds_batch": run.bounds_batch,
        "list_batch": run.list_batch,
        "dense_rows": run.dense_rows,
        "grid_rows": run.row_tiles - run.dense_rows,
        "pairs": pairs,
        "prefix_tiles": run.dense_columns[0],
        "suffix_tiles": run.dense_columns[1],
        "prefix": layout.prefix,
        "suffix_start": layout.prefix + layout.tokens,
        "suffix": layout.suffix,
        "extra": run.extra,
        "positions": run.tokens,
        "position_offsets": run.tokens,
        "centre": 0,
        "rpb_entries": 0,
    }
    if column_positions:
        place = positions(work.pattern, work.layout, run.tokens.device)
        arguments |= {
            "positions": place.tokens,
            "position_offsets": place.offsets(run.column_tiling),
            "centre": place.centre,
            "rpb_entries": place.entries,
        }
    return arguments


def constants(q: torch.Tensor, work: Work, unit: int) -> dict[str, Any]:
    """Compile-time arguments of every kernel with matrix products."""
    # Three products of tf32 halves give float32's accuracy on tensor cores; without them Triton keeps whole rows
    # in registers.
    precision = "ieee" if q.dtype != torch.float32 else "tf32" if work.tf32 else "tf32x3"
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_DIM": block_dim(q.shape[3]),
        "UNIT": unit,
        "KEY_MASK": work.key_mask is not None,
        "PRECISION": precision,
    }


def list_constants(run: Program, *columns: torch.Tensor) -> dict[str, Any]:
    """Which loops a kernel has, its tile sizes, and how its two column tensors lie.

    WIDE says that a box spans 2^31 elements, ALIKE that tokens are equally far apart in both.
    """
    reach = max(run.columns, run.reach) * max(abs(t.stride(1)) for t in columns) + columns[0].shape[3]
    return {
        "WIDE": reach >= 2**31,
        "ALIKE": columns[0].stride(1) == columns[1].stride(1),
        "ROWS": run.rows,
        "COLUMNS": run.columns,
        "TILES": run.tiles,
        "FULL": run.full,
        "PARTIAL": run.partial,
        "DENSE": run.has_dense,
    }


def forward_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    work: Work,
) -> dict[str, Any]:
    """Arguments of `forward.attend`; rpb is float32 [H, entries]."""
    run = work.program("forward", q.device)
    step = unit(q, k, v)
    return {
        "q": q, "k": k, "v": v, "out": out,
        "lse": q if lse is None else lse,
        "key_mask": q if work.key_mask is None else work.key_mask,
        "rpb": q if rpb is None else rpb,
        "scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **head_arguments(q, k),
        **list_arguments(run, work, rpb is not None, q.shape[0] * q.shape[2]),
        **constants(q, work, step), **list_constants(run, k, v),
        "RPB": rpb is not None,
        "LSE": lse is not None,
    }  # fmt: skip


def gradient_arguments(
    direction: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    work: Work,
) -> dict[str, Any]:
    """Arguments of `key_grad.key_gradients` or `query_grad.query_gradients` without their results."""
    run = work.program(direction, q.device)
    step = unit(q, k, v, grad_out)
    by_keys = direction == "key_grad"
    heads, columns = (k.shape[2], (q, grad_out)) if by_keys else (q.shape[2], (k, v))
    return {
        "q": q, "k": k, "v": v, "grad_out": grad_out, "lse": lse, "delta": delta,
        "key_mask": q if work.key_mask is None else work.key_mask,
        "rpb": q if rpb is None else rpb,
        "scale": work.scale,
        "score_scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **strides("grad", grad_out, step),
        **head_arguments(q, k),
        **list_arguments(run, work, rpb is not None, q.shape[0] * heads),
        **constants(q, work, step), **list_constants(run, *columns),
        "RPB": rpb is not None,
    }  # fmt: skip


def bias_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    partner: torch.Tensor,
    work: Work,
) -> dict[str, Any]:
    """Arguments of `bias_grad.bias_gradients` without its result."""
    step = unit(q, k, v, grad_out)
    return {
        "q": q, "k": k, "v": v, "grad_out": grad_out, "lse": lse, "delta": delta,
        "key_mask": q if work.key_mask is None else work.key_mask,
        "rpb": rpb,
        "partner": partner,
        "scale": work.scale,
        "key_length": k.shape[1],
        "grid_tokens": partner.shape[1],
        "prefix": work.layout.prefix,
        "rpb_entries": rpb.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **strides("grad", grad_out, step),
        **head_arguments(q, k),
        **{name: value for name, value in constants(q, work, step).items() if name != "PRECISION"},
        "ROWS": 32,
    }  # fmt: skip


def delta_arguments(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor
) -> dict[str, Any]:
    """Arguments of `delta.deltas`."""
    step = unit(grad_out)
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    names = ("grad_lse_batch", "grad_lse_token", "grad_lse_head")
    return {
        "out": out, "grad_out": grad_out, "grad_lse": out if grad_lse is None else grad_lse, "delta": delta,
        **strides("grad", grad_out, step),
        **dict(zip(names, lse_strides, strict=True)),
        "length": out.shape[1],
        "heads": out.shape[2],
        "HEAD_DIM": out.shape[3],
        "BLOCK_DIM": block_dim(out.shape[3]),
        "ROWS": 32,
        "UNIT": step,
        "LSE": grad_lse is not None,
    }  # fmt: skip
