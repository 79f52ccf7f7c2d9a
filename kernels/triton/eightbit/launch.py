"""A call in 8 bits: q, k and v are quantised once, then one kernel walks the lists of the bf16 forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.arguments import LOG2E, Operands, Work, head_arguments, list_arguments, strides, unit
from visattn.kernels.triton.config import Config, block_dim
from visattn.kernels.triton.eightbit import quantise
from visattn.kernels.triton.eightbit.forward import attend_8bit
from visattn.kernels.triton.hopper.masks import thread_masks
from visattn.kernels.triton.lists.program import Program, int32_table
from visattn.kernels.triton.start import launch_like, on, programs
from visattn.tiling import Tiling

# Tokens of a program of the statistics, in blocks of so many, and keys of which one block in so many is added up.
CHUNK, BLOCK, EVERY = 512, 64, 4


@dataclass(frozen=True, eq=False)
class Columns:
    """Column tiles in the order in which they are quantised: those of the grid, then the runs of dense tokens.

    Attributes:
        tokens: Token of each slot, -1 if empty: int32 [tiles, slots].
        tile_of: Tile that begins at a token: int32 [tokens].
        run_tiles: Number of the first tile of runs.
    """

    tokens: torch.Tensor
    tile_of: torch.Tensor
    run_tiles: int

    @property
    def tiles(self) -> int:
        """Number of all tiles."""
        return len(self.tokens)


@kept
def columns_of(tiling: Tiling, slots: int, per_step: int, device: torch.device) -> Columns:
    """The column tiles of a plan whose kernel takes `per_step` of them at once."""
    grid = tiling.tokens[tiling.grid_tiles]
    grid = np.pad(grid, ((0, 0), (0, slots - grid.shape[1])), constant_values=-1)
    layout = tiling.layout
    suffix = layout.prefix + layout.tokens
    dense = ((0, layout.prefix), (suffix, layout.suffix), (layout.length, tiling.extra))
    runs = [_run(first, count, slots * per_step).reshape(-1, slots) for first, count in dense]
    tile_of = np.zeros(tiling.length + 1, np.int64)
    begins = np.flatnonzero(grid[:, 0] >= 0)
    tile_of[grid[begins, 0]] = begins

    return Columns(int32_table(np.concatenate([grid, *runs]), device), int32_table(tile_of, device), len(grid))


def _run(first: int, count: int, step: int) -> np.ndarray:
    """Tokens of a run of dense tokens in whole steps, -1 behind its end."""
    index = np.arange(-(-count // step) * step)
    return np.where(index < count, first + index, -1)


@dataclass(frozen=True, eq=False)
class Bytes:
    """Queries, keys and values in 8 bits; see the kernels of `quantise` for shapes.

    Attributes:
        q8: Queries.
        k8: Keys.
        v8: Values.
        q_scale: What scores are to be multiplied by for logits of base 2, per query.
        q_offset: What is to be added to the log-sum-exp, base 2, per query; anything where nobody wants it.
        k_scale: The same per column tile.
        v_shift: What is to be added to the output, per channel.
        v_scale: What it is to be multiplied by before.
        found: What the scales are from, as k_shift.
        k_shift: What keys are shifted by.
    """

    q8: torch.Tensor
    k8: torch.Tensor
    v8: torch.Tensor
    q_scale: torch.Tensor
    q_offset: torch.Tensor
    k_scale: torch.Tensor
    v_shift: torch.Tensor
    v_scale: torch.Tensor
    found: torch.Tensor
    k_shift: torch.Tensor

    def given(self) -> dict[str, torch.Tensor]:
        """What the kernel that computes attention takes of these."""
        return {name: value for name, value in vars(self).items() if name not in ("found", "k_shift")}

    def tensors(self) -> list[torch.Tensor]:
        """All of these, each once."""
        return list({id(value): value for value in vars(self).values()}.values())


def quantised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Program, columns: Columns, scale: float, fp8: bool,
    woven: bool, lse: bool,
) -> Bytes:  # fmt: skip
    """Quantise a call.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D], as v.
        v: Values.
        run: The lists.
        columns: The column tiles.
        scale: Factor on the logits.
        fp8: Whether values become e4m3 instead of int8.
        woven: Whether values are for Hopper's kernel, see `quantise.woven`.
        lse: Whether the log-sum-exp is wanted.
    """
    batch, length, heads, head_dim = k.shape
    dim, pairs, rows = block_dim(head_dim), batch * heads, q.shape[0] * q.shape[2]
    tiles, slots = columns.tokens.shape
    chunks, step = -(-length // CHUNK), unit(q, k, v)
    device = q.device
    k_shift, v_shift, v_scale = (torch.empty((pairs, dim), dtype=torch.float32, device=device) for _ in range(3))
    q_scale = torch.empty((rows, run.row_tiles, run.rows), dtype=torch.float32, device=device)
    made = Bytes(
        torch.empty((rows, run.row_tiles, run.rows, dim), dtype=torch.int8, device=device),
        torch.empty((pairs, tiles, slots, dim), dtype=torch.int8, device=device),
        torch.empty((pairs, tiles, dim, slots), dtype=torch.float8_e4m3fn if fp8 else torch.int8, device=device),
        q_scale,
        torch.empty_like(q_scale) if lse else q_scale,
        torch.empty((pairs, tiles), dtype=torch.float32, device=device),
        v_shift,
        v_scale,
        torch.empty((pairs, chunks, 4, dim), dtype=torch.float32, device=device),
        k_shift,
    )
    sizes = {"HEAD_DIM": head_dim, "BLOCK_DIM": dim}
    both = {**strides("k", k, step), **strides("v", v, step)}
    shared = {"k_shift": k_shift, "v_shift": v_shift, "v_scale": v_scale}
    summed = sum(min(BLOCK, length - first) for first in range(0, length, BLOCK * EVERY))
    launch_like(quantise.column_statistics, (chunks, pairs), {
        "k": k, "v": v, "found": made.found, **both, "heads": heads, "length": length, "chunk": CHUNK, "chunks": chunks,
        "block": BLOCK, "every": EVERY, **sizes, "ROWS": 16, "UNIT": step,
    }, 4, 1)  # fmt: skip
    launch_like(quantise.column_scales, (pairs,), {
        "found": made.found, **shared, "summed": float(summed), "length": length, "chunks": chunks,
        **sizes, "PARTS": 16, "FP8": fp8,
    }, 4, 1)  # fmt: skip
    launch_like(quantise.quantise_columns, (tiles, pairs), {
        "k": k, "v": v, "tokens": columns.tokens, **shared, "k8": made.k8, "v8": made.v8, "k_scale": made.k_scale,
        **both, "heads": heads, "tiles": tiles, **sizes, "SLOTS": slots, "UNIT": step, "FP8": fp8, "WOVEN": woven,
    }, 4, 1)  # fmt: skip
    launch_like(quantise.quantise_rows, (run.row_tiles, rows), {
        "q": q, "tokens": run.tokens, "k_shift": shared["k_shift"], "q8": made.q8, "q_scale": made.q_scale,
        "q_offset": made.q_offset, **strides("q", q, step), "scale": scale * LOG2E, "heads": q.shape[2],
        "group": q.shape[2] // heads, "row_tiles": run.row_tiles, **sizes, "ROWS": run.rows, "UNIT": step, "LSE": lse,
    }, 4, 1)  # fmt: skip
    return made


def forward(t: Operands, work: Work, fp8: bool) -> Bytes:
    """Attention of a call into its output and log-sum-exp.

    Args:
        t: q, k, v, key mask, results; for Hopper's own kernel the counter of its tiles.
        work: The call; its forward's configuration is one of 8 bits.
        fp8: Whether weights and values become e4m3 instead of int8.

    Returns:
        What it was computed from.
    """
    run, config = work.program("forward", t), work.configs["forward"]
    columns = columns_of(run.column_tiling, run.columns // run.tiles, run.tiles, t.q.device)
    with on(t.q.device):
        made = quantised(t.q, t.k, t.v, run, columns, work.scale, fp8, config.hopper, t.lse is not None)
        given = _arguments(t, work, run, columns, fp8)
        if config.hopper:
            _on_hopper(made, given | {"taken": t.taken, "RAGGED": run.ragged}, config)
        else:
            more = {
                **made.given(),
                "key_mask": t.q if t.key_mask is None else t.key_mask, "key_length": t.k.shape[1],
                "key_tokens": columns.tokens, "BLOCK_DIM": block_dim(t.q.shape[3]),
                "FULL": run.full, "DENSE": run.has_dense, "KEY_MASK": t.key_mask is not None,
            }  # fmt: skip
            launch_like(attend_8bit, programs(given), given | more, config.warps, config.stages)
    return made


def _on_hopper(made: Bytes, given: dict[str, Any], config: Config) -> None:
    """Start Hopper's own kernel, which reads by descriptors."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from visattn.kernels.triton.hopper.eightbit.forward import attend_8bit as attend_on_hopper
    from visattn.kernels.triton.hopper.parts import GROUP_ROWS

    def descriptor(x: torch.Tensor, rows: int) -> Any:
        layout = NVMMASharedLayout(swizzle_byte_width=x.shape[-1], element_bitwidth=8, rank=2)
        return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, x.shape[-1]], layout)

    copied = {"q8": made.q8, "k8": made.k8, "v8": made.v8}
    rows = {"q8": int(GROUP_ROWS), "k8": made.k8.shape[2], "v8": made.v8.shape[2]}
    given = given | made.given() | {name: descriptor(x, rows[name]) for name, x in copied.items()}
    given |= {"masks": thread_masks(given["masks"]), "STAGES": config.stages}
    units = torch.cuda.get_device_properties(made.q8.device).multi_processor_count
    grid = (min(units, programs(given)[0]),)
    launch_like(attend_on_hopper, grid, given, config.warps, None, copied)


def _arguments(t: Operands, work: Work, run: Program, columns: Columns, fp8: bool) -> dict[str, Any]:
    """What both kernels take besides the quantised tensors."""
    q, k = t.q, t.k
    lists = list_arguments(run, work, False, q.shape[0] * q.shape[2], q.shape[2])
    unused = ("positions", "position_offsets", "centre", "rpb_entries", "offsets")
    return {
        "out": t.out, "lse": t.out if t.lse is None else t.lse,
        **{name: value for name, value in lists.items() if name not in unused},
        **head_arguments(q, k),
        "tile_of": columns.tile_of, "tiles": columns.tiles, "run_tiles": columns.run_tiles,
        "row_tiles": run.row_tiles,
        "HEAD_DIM": q.shape[3], "ROWS": run.rows, "COLUMNS": run.columns, "TILES": run.tiles,
        "PARTIAL": run.partial, "LSE": t.lse is not None, "FP8": fp8,
    }  # fmt: skip
