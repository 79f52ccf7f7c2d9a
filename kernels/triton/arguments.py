"""The arguments of the kernels for a problem: one place for launches and for ahead-of-time compilation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from visattn.kernels.triton.boxes import KEY_HALVES, QUERY_HALVES, tiled
from visattn.kernels.triton.config import Config, block_dim
from visattn.kernels.triton.lists.positions import positions
from visattn.kernels.triton.lists.program import Program, program
from visattn.kernels.triton.start import Starts
from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.plans import TilePlan

LOG2E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class Work:
    """What calls that are alike share besides the shapes of their tensors.

    Attributes:
        pattern: The pattern.
        layout: The tokens.
        scale: Factor on the logits, not negative.
        tf32: Whether float32 products may round their factors to tf32.
        configs: Launch configuration of each direction.
        starts: Their kernels.
        ways: What lists of a direction that q and k choose need and no call changes.
    """

    pattern: Pattern
    layout: Layout
    scale: float
    tf32: bool
    configs: dict[str, Config]
    starts: Starts
    ways: dict[str, Any] = field(default_factory=dict, repr=False)

    def plan(self, direction: str) -> TilePlan:
        """The tiles of a kernel."""
        return plan_of(self.pattern, self.layout, direction, self.configs[direction])

    def program(self, direction: str, t: Operands) -> Program:
        """The lists that a kernel walks."""
        if t.routed is not None:
            return t.routed.program(direction)
        by_keys = direction == "key_grad"
        launch = self.configs[direction]
        return program(self.plan(direction), by_keys, launch.per_step, t.q.device, launch.halves)


class Routed(Protocol):
    """The lists of one call of a routed pattern."""

    def program(self, direction: str) -> Program:
        """Those that a kernel walks."""
        ...

    def addresses(self, direction: str) -> list[int]:
        """Where their bounds, bases and masks are."""
        ...


@dataclass(eq=False)
class Operands:
    """The tensors of one call.

    Attributes:
        q: Queries [B, S, H, D].
        k: Keys [B, S + extra, Hkv, D].
        v: Values [B, S + extra, Hkv, D].
        rpb: Bias, float32 [H, entries], or None.
        key_mask: uint8 [B, S + extra], or None.
        out: Output [B, S, H, D], contiguous.
        lse: Log-sum-exp, float32 [B, H, S], or None where nobody wants it.
        grad_out: Gradient of `out`.
        grad_lse: Gradient of the log-sum-exp [B, S, H], or None.
        delta: Sums of `out` times its gradient, float32 [B, H, S].
        grad_q: Gradient of q, contiguous.
        grad_k: Gradient of k, contiguous.
        grad_v: Gradient of v, contiguous.
        taken: Counter of the Hopper kernel's tiles.
        sums: dQ by query tiles without its scale, for the one-pass backward: float32.
        turns: How many key tiles have added their part to each of them: int32.
        routed: Lists of a routed pattern.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rpb: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    grad_out: torch.Tensor | None = None
    grad_lse: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    grad_q: torch.Tensor | None = None
    grad_k: torch.Tensor | None = None
    grad_v: torch.Tensor | None = None
    taken: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    routed: Routed | None = None

    def given(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of these that there are."""
        tensors = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def plan_of(pattern: Pattern, layout: Layout, direction: str, launch: Config) -> TilePlan:
    """The tiles of a kernel: its rows are queries, but for dK/dV keys."""
    by_keys = direction == "key_grad"
    slots = (launch.tile, launch.rows) if by_keys else (launch.rows, launch.tile)
    halves = (KEY_HALVES if by_keys else QUERY_HALVES) if launch.halves else None
    return tiled(pattern, layout, *slots, halves)


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


def list_arguments(run: Program, work: Work, column_positions: bool, pairs: int, heads: int) -> dict[str, Any]:
    """The lists of a program for so many query heads, and the positions if there is a bias."""
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
        "list_heads": heads // run.groups,
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


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How factors of products are rounded; `tf32` says that those of float32 may be rounded to it."""
    # Three products of tf32 halves give float32's accuracy on tensor cores; without them Triton keeps whole rows
    # in registers.
    return "ieee" if dtype != torch.float32 else "tf32" if tf32 else "tf32x3"


def constants(t: Operands, work: Work, unit: int) -> dict[str, Any]:
    """Compile-time arguments of every kernel with matrix products."""
    return {
        "HEAD_DIM": t.q.shape[3],
        "BLOCK_DIM": block_dim(t.q.shape[3]),
        "UNIT": unit,
        "KEY_MASK": t.key_mask is not None,
        "PRECISION": precision(t.q.dtype, work.tf32),
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


def merged_arguments(run: Program) -> dict[str, Any]:
    """Who of a tile of several query blocks sees an entry; something that is not read where all do."""
    merged = run.words is not None
    return {"words": run.words if merged else run.bases, "bits": run.bits if merged else run.offsets, "MERGED": merged}


def optional(t: Operands, *names: str) -> dict[str, torch.Tensor]:
    """Tensors that a kernel has an argument for and may not read: q stands for those that there are not."""
    return {name: t.q if getattr(t, name) is None else getattr(t, name) for name in names}


def forward_arguments(t: Operands, work: Work) -> dict[str, Any]:
    """Arguments of `forward.attend`."""
    q, k, v, run = t.q, t.k, t.v, work.program("forward", t)
    step = unit(q, k, v)
    return {
        "q": q, "k": k, "v": v, "out": t.out,
        **optional(t, "lse", "key_mask", "rpb"),
        "scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **head_arguments(q, k),
        **list_arguments(run, work, t.rpb is not None, q.shape[0] * q.shape[2], q.shape[2]),
        **constants(t, work, step), **list_constants(run, k, v), **merged_arguments(run),
        "RPB": t.rpb is not None,
        "LSE": t.lse is not None,
    }  # fmt: skip


def gradient_arguments(direction: str, t: Operands, work: Work) -> dict[str, Any]:
    """Arguments of `key_grad.key_gradients` or `query_grad.query_gradients`."""
    q, k, v, grad_out, run = t.q, t.k, t.v, t.grad_out, work.program(direction, t)
    assert grad_out is not None
    step = unit(q, k, v, grad_out)
    by_keys = direction == "key_grad"
    heads, columns = (k.shape[2], (q, grad_out)) if by_keys else (q.shape[2], (k, v))
    results = {"grad_k": t.grad_k, "grad_v": t.grad_v} if by_keys else {"grad_q": t.grad_q}
    return {
        "q": q, "k": k, "v": v, "grad_out": grad_out, "lse": t.lse, "delta": t.delta, **results,
        **optional(t, "key_mask", "rpb"),
        "scale": work.scale,
        "score_scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **strides("grad", grad_out, step),
        **head_arguments(q, k),
        **list_arguments(run, work, t.rpb is not None, q.shape[0] * heads, q.shape[2]),
        **constants(t, work, step), **list_constants(run, *columns), **merged_arguments(run),
        "RPB": t.rpb is not None,
    }  # fmt: skip


def bias_arguments(t: Operands, partner: torch.Tensor, work: Work) -> dict[str, Any]:
    """Arguments of `bias_grad.bias_gradients` without its result."""
    q, k, v, grad_out = t.q, t.k, t.v, t.grad_out
    assert grad_out is not None and t.rpb is not None
    step = unit(q, k, v, grad_out)
    return {
        "q": q, "k": k, "v": v, "grad_out": grad_out, "lse": t.lse, "delta": t.delta,
        **optional(t, "key_mask"),
        "rpb": t.rpb,
        "partner": partner,
        "scale": work.scale,
        "key_length": k.shape[1],
        "grid_tokens": partner.shape[1],
        "prefix": work.layout.prefix,
        "rpb_entries": t.rpb.shape[1],
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        **strides("grad", grad_out, step),
        **head_arguments(q, k),
        **{name: value for name, value in constants(t, work, step).items() if name != "PRECISION"},
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


def delta_programs(out: torch.Tensor, given: dict[str, Any]) -> tuple[int]:
    """The launch grid of `delta.deltas`: a program for each block of tokens of each (sample, head) pair."""
    return (out.shape[0] * out.shape[2] * -(-out.shape[1] // given["ROWS"]),)
