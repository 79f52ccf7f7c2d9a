"""Which calls the Hopper kernels take, and their launches."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.arguments import (
    LOG2E,
    Operands,
    Work,
    head_arguments,
    list_arguments,
    optional,
    plan_of,
    strides,
    unit,
)
from visattn.kernels.triton.choosing.tables import writes_lists
from visattn.kernels.triton.config import HOPPER, HOPPER_WIDTHS, Config
from visattn.kernels.triton.hopper.masks import thread_masks
from visattn.kernels.triton.hopper.turns import Turns, turns
from visattn.kernels.triton.lists.program import Program
from visattn.kernels.triton.start import Launch, programs
from visattn.layout import Layout
from visattn.patterns import Pattern, RoutedPattern
from visattn.plans import TilePlan
from visattn.problem import Call

# Warps of the kernels' first role; the others are told apart inside them.
WARPS = 4
# Channels of one copy: 128 bytes, the widest swizzle of shared memory.
PIECE = 64
# Share of tiles without mask below which the two groups of warps take turns in the tensor cores: with masks to apply it
# is 1 to 3 % faster, without it as much slower (docs/gpu-notes.md).
TAKE_TURNS = 0.9
# The same share above which dQ at head dim 64 is the general kernel's, which is 3 % faster there; where more tiles have
# masks the Hopper kernel is 30 % faster (docs/gpu-notes.md).
PLAIN = 0.9
# Whether the forward gives keys and values back by one arrival where no steps are left out.
GIVE_BACK_TOGETHER = False
# Pairs of a sample and a head whose key tiles start together in the one-pass backward: of fewer pairs more key tiles
# run at a time and wait for their turns, of more pairs the tiles that they share have left the L2 cache.
TOGETHER = 4


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether this Triton has Gluon for Hopper."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False


def width(head_dim: int) -> int:
    """Channels that the kernels compute with for a head dim, those behind it zero; 0 where the general kernels run."""
    return HOPPER_WIDTHS.get(head_dim, 0)


def hopper_config(
    architecture: int, dtype: torch.dtype, head_dim: int, pattern: Pattern, layout: Layout, direction: str = "forward"
) -> Config | None:
    """The configuration of a Hopper kernel, or None for problems that need the general one.

    Args:
        architecture: Compute capability times ten.
        dtype: Of q, k and v.
        head_dim: Channels per head.
        pattern: The pattern.
        layout: The tokens.
        direction: "forward", "key_grad" or "query_grad".
    """
    launch = HOPPER.get(direction, {}).get(width(head_dim))
    if architecture != 90 or launch is None or dtype.itemsize != 2 or not installed():
        return None
    if launch.one_pass and head_dim != width(head_dim):
        return None
    plan = plan_of(pattern, layout, direction, launch)
    if isinstance(pattern, RoutedPattern) and not writes_lists(pattern, plan):
        return None
    rows, columns = (plan.keys, plan.queries) if direction == "key_grad" else (plan.queries, plan.keys)
    # A copy takes a whole box of neighbouring tokens; fewer rows than the kernel has would be half idle.
    if direction == "query_grad" and head_dim <= 64 and plan.full_share > PLAIN:
        return None
    boxes = columns.capacity == launch.tile and all(side & (side - 1) == 0 for side in columns.shape)
    fills = rows.capacity > launch.rows // 2
    # Lists of query tiles that are made at run time are never empty (`choosing.lists`).
    filled = isinstance(pattern, RoutedPattern) or _no_list_empty(plan)
    return launch if boxes and fills and filled and all(step == 1 for step in columns.step) else None


@kept
def _no_list_empty(plan: TilePlan) -> bool:
    """Whether every query tile sees a key tile: the forward writes results in the first step of the tile after."""
    return len(np.unique(plan.lists.rows)) == plan.queries.tiles


def faster_configs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, architecture: int
) -> dict[str, Config]:
    """The directions of a call that a Hopper kernel takes, and its configuration there."""
    if call.rpb is not None or not call.scale:
        return {}
    directions = []
    if copyable(k, v):
        directions += ["forward", "query_grad"]
    # A program has one query head.
    if copyable(q, q) and q.shape[2] == k.shape[2]:
        directions.append("key_grad")
    problem = (architecture, q.dtype, q.shape[3], call.pattern, call.layout)
    found = {direction: hopper_config(*problem, direction) for direction in directions}
    return {direction: config for direction, config in found.items() if config is not None}


def copyable(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the copies can address two tensors [B, S, H, D] with contiguous channels, both alike."""
    return _addressable(a) and _addressable(b) and folded(a) == folded(b)


def folded(x: torch.Tensor) -> bool:
    """Whether a descriptor sees the heads of [B, S, H, D] in the channels; else they lie in one axis with B."""
    batch, _, heads, _ = x.shape
    return batch > 1 and heads > 1 and x.stride(0) != heads * x.stride(2)


def _addressable(x: torch.Tensor) -> bool:
    """Whether copies can address a tensor [B, S, H, D]: 16-byte steps, and heads next to batch or to channels."""
    aligned = x.data_ptr() % 16 == 0
    steps = all(stride > 0 and stride % 8 == 0 for stride, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return aligned and steps and (not folded(x) or x.stride(2) == x.shape[3])


def _descriptor(x: torch.Tensor, first: int, grid: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """Descriptor of tokens from `first`, cut as a grid of up to three axes: [outer, t, y, x, channels]."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, _, heads, head_dim = x.shape
    token = x.stride(1)
    sides = (1,) * (3 - len(grid)) + grid
    if folded(x):
        outer, outer_stride, channels = batch, x.stride(0), heads * head_dim
    else:
        outer, channels = batch * heads, head_dim
        outer_stride = x.stride(2) if heads > 1 else x.stride(0)
    # The stride of an axis of length 1 means nothing, but must be a multiple of 16 bytes all the same.
    outer_stride = outer_stride if outer > 1 else PIECE
    steps = [outer_stride, token * sides[1] * sides[2], token * sides[2], token, 1]
    tile = [1, *(1,) * (3 - len(box)), *box, PIECE]
    return TensorDescriptor(x[:, first:], [outer, *sides, channels], steps, tile, _box_layout())


@lru_cache(maxsize=1)
def _box_layout() -> Any:
    """How a copied box lies in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)


def key_launch(t: Operands, work: Work) -> Launch:
    """The launch of the backward kernel for keys and values; its results are contiguous."""
    from visattn.kernels.triton.hopper.key_grad import key_gradients

    given = key_arguments(t, work) | t.given("grad_k", "grad_v")
    copied = {"q_grid": "q", "q_runs": "q", "grad_grid": "grad_out", "grad_runs": "grad_out"}
    return Launch(key_gradients, programs(given), given, WARPS, copied=copied)


def key_arguments(t: Operands, work: Work) -> dict[str, Any]:
    """Arguments of `hopper_key_grad.key_gradients` without its results."""
    k, v = t.k, t.v
    assert t.grad_out is not None
    step = unit(k, v)
    return {
        **_common_arguments("key_grad", ("q", "grad"), (t.q, t.grad_out), k, t, work),
        "k": k, "v": v, "lse": t.lse, "delta": t.delta,
        "scale": work.scale,
        "score_scale": work.scale * LOG2E,
        "heads": k.shape[2], "length": t.q.shape[1], "key_length": k.shape[1],
        **strides("k", k, step), **strides("v", v, step),
        "UNIT": step, "DENSE": work.program("key_grad", t).has_dense,
    }  # fmt: skip


def query_launch(t: Operands, work: Work) -> Launch:
    """The launch of the backward kernel for queries; its result is contiguous."""
    from visattn.kernels.triton.hopper.query_grad import query_gradients

    given = query_arguments(t, work) | t.given("grad_q")
    copied = {"k_grid": "k", "k_runs": "k", "v_grid": "v", "v_runs": "v"}
    return Launch(query_gradients, programs(given), given, WARPS, copied=copied)


def query_arguments(t: Operands, work: Work) -> dict[str, Any]:
    """Arguments of `hopper.query_grad.query_gradients` without its result."""
    q, k, grad_out = t.q, t.k, t.grad_out
    assert grad_out is not None
    step = unit(q, grad_out)
    return {
        **_common_arguments("query_grad", ("k", "v"), (k, t.v), q, t, work),
        "q": q, "grad_out": grad_out, "lse": t.lse, "delta": t.delta,
        "scale": work.scale,
        "score_scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **strides("grad", grad_out, step), **head_arguments(q, k),
        "UNIT": step, "DENSE": work.program("query_grad", t).has_dense,
    }  # fmt: skip


def one_pass_launch(t: Operands, work: Work) -> Launch:
    """The launch of the backward kernel for all three gradients: dK and dV, and dQ as sums of the grid's tiles."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from visattn.kernels.triton.hopper.one_pass import gradients

    listed, sums = _turns(t, work), t.sums
    assert sums is not None
    given = key_arguments(t, work) | t.given("grad_k", "grad_v", "turns")
    unused = (
        "halves", "mask_ids", "bounds_batch", "list_batch", "list_heads", "key_mask", "KEY_MASK", "HALVES", "BLOCK_DIM",
    )  # fmt: skip
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    box = [listed.run.columns, 32]
    given = {name: value for name, value in given.items() if name not in unused} | {
        "sum_tiles": TensorDescriptor(sums, list(sums.shape), [sums.shape[1], 1], box, layout),
        "tokens": listed.rows, "bounds": listed.bounds, "bases": listed.bases, "visits": listed.visits,
        "masks": thread_masks(listed.masks), "PARTIAL": listed.partial, "tiles": len(listed.columns),
        "together": TOGETHER, "ORDER": work.configs["key_grad"].one_pass - 1,
    }  # fmt: skip
    copied = {"q_grid": "q", "q_runs": "q", "grad_grid": "grad_out", "grad_runs": "grad_out", "sum_tiles": "sums"}
    return Launch(gradients, programs(given), given, WARPS, copied=copied)


def finish_launch(t: Operands, work: Work) -> Launch:
    """The launch of the kernel that writes dQ of the grid's tokens from its sums."""
    from visattn.kernels.triton.hopper.one_pass import finish

    listed = _turns(t, work)
    tiles, columns = listed.columns.shape
    given = t.given("sums", "grad_q") | {
        "tokens": listed.columns, "scale": work.scale, "tiles": tiles, "length": t.q.shape[1],
        "heads": t.q.shape[2], "HEAD_DIM": t.q.shape[3], "COLUMNS": columns,
    }  # fmt: skip
    return Launch(finish, (t.q.shape[0] * t.q.shape[2] * tiles,), given, WARPS)


def dense_launch(t: Operands, work: Work) -> Launch:
    """The launch that computes dQ of dense tokens, of which there are some.

    They see everything, so that adding to their dQ in turns would be a queue.
    """
    made = query_launch(t, work)
    return made._replace(grid=(made.given["dense_rows"] * made.given["pairs"],))


def one_pass_buffers(t: Operands, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums and turns of a call, zero."""
    tiles, columns = _turns(t, work).columns.shape
    pairs = t.q.shape[0] * t.q.shape[2]
    sums = torch.zeros(pairs * tiles * columns, t.q.shape[3], dtype=torch.float32, device=t.q.device)
    return sums, torch.zeros(pairs, tiles, dtype=torch.int32, device=t.q.device)


def _turns(t: Operands, work: Work) -> Turns:
    return turns(work.plan("key_grad"), t.q.device)


def forward_launch(t: Operands, work: Work) -> Launch:
    """The launch of the forward kernel; its results are contiguous."""
    from visattn.kernels.triton.hopper.forward import attend

    given = hopper_arguments(t, work)
    units = torch.cuda.get_device_properties(t.q.device).multi_processor_count
    copied = {"k_grid": "k", "k_runs": "k", "v_grid": "v", "v_runs": "v"}
    return Launch(attend, (min(units, programs(given)[0]),), given, WARPS, copied=copied)


def hopper_arguments(t: Operands, work: Work) -> dict[str, Any]:
    """Arguments of `hopper.attend`."""
    q, k = t.q, t.k
    step, run = unit(q), work.program("forward", t)
    return {
        **_common_arguments("forward", ("k", "v"), (k, t.v), q, t, work),
        "q": q, "out": t.out, **optional(t, "lse"),
        "taken": t.taken,
        "scale": work.scale * LOG2E,
        "key_length": k.shape[1],
        **strides("q", q, step), **head_arguments(q, k),
        "UNIT": step, "LSE": t.lse is not None,
        "TILES": run.tiles,
        "TURNS": work.plan("forward").full_share < TAKE_TURNS,
        "VALUE_STAGES": value_stages(run, work.configs["forward"].stages),
        "RAGGED": run.ragged,
        "TOGETHER": GIVE_BACK_TOGETHER and run.halves is None,
    }  # fmt: skip


def value_stages(run: Program, stages: int) -> int:
    """Slots of the ring of values.

    Where halves leave steps out, values wait for two steps: a third slot lets the copies go on meanwhile.
    """
    if run.halves is None:
        return stages + 1 if GIVE_BACK_TOGETHER else stages
    return max(stages, 3)


def _common_arguments(
    direction: str,
    names: tuple[str, str],
    copied: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    t: Operands,
    work: Work,
) -> dict[str, Any]:
    """What both kernels take: descriptors of the two tensors that are copied, the lists, sizes."""
    run = work.program(direction, t)
    columns = run.column_tiling
    prefix, grid, box = columns.layout.prefix, columns.layout.grid, columns.shape
    lists = list_arguments(run, work, False, rows.shape[0] * rows.shape[2], rows.shape[2])
    # Biases are for the general kernels.
    unused = ("positions", "position_offsets", "centre", "rpb_entries")
    descriptors = {}
    for name, x in zip(names, copied, strict=True):
        descriptors[f"{name}_grid"] = _descriptor(x, prefix, grid, box)
        descriptors[f"{name}_runs"] = _descriptor(x, 0, (x.shape[1],), (run.columns,))
    return {
        **descriptors,
        **{name: value for name, value in lists.items() if name not in unused},
        "masks": thread_masks(run.masks),
        "halves": run.bounds if run.halves is None else run.halves,
        "key_mask": rows if t.key_mask is None else t.key_mask,
        "side_y": math.prod(grid[-2:-1]), "side_x": grid[-1],
        "HEAD_DIM": rows.shape[3], "BLOCK_DIM": width(rows.shape[3]), "ROWS": run.rows, "COLUMNS": run.columns,
        "BOX": (1,) * (3 - len(box)) + box,
        "FOLDED": folded(copied[0]),
        "STAGES": work.configs[direction].stages,
        "PARTIAL": run.partial, "KEY_MASK": t.key_mask is not None,
        "HALVES": run.halves is not None,
    }  # fmt: skip
