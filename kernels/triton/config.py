"""Tile sizes, warps and pipeline stages of each kernel: a table by architecture, dtype, head dim and direction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern
from visattn.patterns.routing import Routing

# Kernels in the order in which a training step runs them.
DIRECTIONS = ("forward", "key_grad", "query_grad")
# Those whose rows are queries.
BY_QUERIES = ("forward", "query_grad")
# Bytes of shared memory that one program can have (CUDA C programming guide, "Technical specifications").
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Regions that the kernels of `routing` choose from at most: products head by head of more would fill the memory.
MOST_REGIONS = 256
# Tokens of a query block up to which blocks share a tile: more fill at least half of the rows of most kernels.
SHARING = 32
# Slots of a column tile at least where a step has several: more tiles of a step are more addresses.
LEAST_SLOTS = 8
# Padded head dims; others take the next larger one.
BLOCK_DIMS = (16, 32, 64, 128, 256)


def chosen_by_kernels(pattern: Pattern, layout: Layout, masked: bool) -> bool:
    """Whether the kernels of `routing` choose what a pattern lists, rather than operators of torch."""
    return isinstance(pattern, Routing) and not masked and math.prod(pattern.parts(layout.grid)) <= MOST_REGIONS


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Tokens of a row tile (queries, or keys in the dK/dV kernel).
        columns: Tokens of the column tiles of one step.
        warps: Warps per program.
        stages: Steps in flight.
        per_step: Column tiles of one step.
        hopper: Whether the kernel is one of `hopper`, whose warps are fixed.
        halves: Whether its lists say what each half of a row tile has to do (`lists.halves`).
        one_pass: Whether the kernel of dK and dV computes dQ as well where all three are wanted (`hopper.one_pass`):
            0 does not, 1 and 2 are orders of its products.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    per_step: int = 1
    hopper: bool = False
    halves: bool = False
    one_pass: int = 0

    @property
    def tile(self) -> int:
        """Tokens of a column tile."""
        return self.columns // self.per_step


# By family of architectures, then direction, then bytes per element and padded head dim. A head dim that is not
# listed takes the next larger one. None of these spills registers (`ahead.stray`): `resources` checks it.
_TABLE: dict[str, dict[str, dict[int, dict[int, Config]]]] = {
    # 163 KiB of shared memory: A100.
    "ampere": {
        "forward": {
            2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
            4: {64: Config(32, 32, 4, 2), 128: Config(16, 32, 4, 1)},
        },
        "key_grad": {
            2: {64: Config(128, 32, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
            4: {16: Config(32, 32, 8, 1), 32: Config(32, 16, 8, 1), 64: Config(32, 32, 8, 1),
                128: Config(16, 32, 8, 1)},
        },
        "query_grad": {
            2: {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
            4: {16: Config(32, 32, 4, 1), 64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1)},
        },
    },
    # 99 KiB: A10, RTX 30, 40 and 50.
    "small": {
        "forward": {
            2: {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
            4: {64: Config(32, 32, 4, 2), 128: Config(16, 32, 4, 1)},
        },
        "key_grad": {
            2: {64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
            4: {16: Config(32, 32, 8, 1), 32: Config(32, 16, 8, 1), 64: Config(32, 32, 8, 1),
                128: Config(16, 32, 8, 1)},
        },
        "query_grad": {
            2: {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
            4: {16: Config(32, 32, 4, 1), 64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1)},
        },
    },
    # 227 KiB: H100, H200, B200.
    "large": {
        "forward": {
            2: {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 3)},
            4: {64: Config(32, 32, 4, 2), 128: Config(16, 32, 4, 1)},
        },
        "key_grad": {
            2: {32: Config(64, 32, 4, 3), 64: Config(64, 64, 4, 3), 128: Config(128, 32, 8, 3),
                256: Config(32, 32, 8, 2)},
            4: {16: Config(32, 32, 8, 1), 32: Config(32, 16, 8, 1), 64: Config(32, 32, 8, 1),
                128: Config(16, 32, 8, 1)},
        },
        "query_grad": {
            2: {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
            4: {16: Config(32, 32, 4, 1), 64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1)},
        },
    },
    # The interpreter: small tiles, so that small grids have many.
    "interpreter": {
        "forward": {size: {256: Config(32, 64, 4, 1, 2)} for size in (2, 4)},
        "key_grad": {size: {256: Config(32, 16, 4, 1)} for size in (2, 4)},
        "query_grad": {size: {256: Config(16, 64, 4, 1, 2)} for size in (2, 4)},
    },
}  # fmt: skip


# Configurations of the kernels of `hopper` by head dim, for 16-bit types on sm_90.
HOPPER = {
    "forward": {64: Config(128, 128, 4, 3, 2, True, True), 128: Config(128, 128, 4, 2, 2, True, True)},
    "key_grad": {64: Config(128, 64, 4, 4, 1, True, True), 128: Config(128, 64, 4, 4, 1, True, True)},
    "query_grad": {64: Config(128, 64, 4, 4, 1, True, True), 128: Config(128, 64, 4, 4, 1, True, True)},
}

# Channels that they compute with, by the head dims that they take.
HOPPER_WIDTHS = {dim: 64 if dim <= 64 else 128 for dim in (*range(40, 65, 8), *range(72, 129, 8))}

# The backward in one pass over the lists, which no call takes unless a script says so (scripts/bench/hopper_gpu.py).
ONE_PASS = {64: Config(128, 64, 4, 4, 1, True, one_pass=1), 128: Config(128, 64, 4, 3, 1, True, one_pass=1)}

# Of the forward in 8 bits, by family and padded head dim: `eightbit.forward`, and Hopper's own kernel.
EIGHT = {
    "ampere": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3)},
    "small": {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 3)},
    "large": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3)},
    "interpreter": {128: Config(32, 64, 4, 1, 2)},
}
EIGHT_HOPPER = {64: Config(128, 128, 4, 4, 2, True), 128: Config(128, 128, 4, 4, 2, True)}


# Instead of the table's where a pattern's row tiles have at most half of its rows, which would leave the others idle:
# by family, direction and bytes, then padded head dim.
HALF: dict[tuple[str, str, int], dict[int, Config]] = {("large", "key_grad", 2): {128: Config(64, 32, 4, 2)}}


def needed_memory(architecture: int) -> int:
    """Bytes of shared memory that the configurations of an architecture may take; unknown ones get the least."""
    return SHARED_MEMORY.get(architecture, min(SHARED_MEMORY.values()))


def family(architecture: int) -> str:
    """The table's family of a compute capability (90 for 9.0; 0 is the interpreter)."""
    if architecture == 0:
        return "interpreter"
    limit = needed_memory(architecture)
    return "large" if limit >= 227 * 1024 else "ampere" if limit >= 163 * 1024 else "small"


def largest_head_dim(dtype: torch.dtype, architecture: int) -> int:
    """The largest head dim whose kernels spill no registers."""
    if dtype != torch.float32:
        return 256
    # Rows of float32 halves take twice the registers; sm_120's compiler needs a few more than there are.
    return 64 if architecture == 120 else 128


def block_dim(head_dim: int) -> int:
    """The head dim that a kernel computes with: a power of two, the rest is zeros."""
    return next(d for d in BLOCK_DIMS if d >= head_dim)


def packed(launch: Config, tokens: int) -> Config:
    """A configuration of the general kernels whose steps hold several column tiles of so many tokens, where they do."""
    slots = max(LEAST_SLOTS, 1 << (tokens - 1).bit_length())
    return launch if slots >= launch.tile else launch._replace(per_step=launch.columns // slots)


def shorter(launch: Config, rows: int) -> Config:
    """A configuration with at most so many rows of a tile, and warps in proportion."""
    if launch.rows <= rows:
        return launch
    return launch._replace(rows=rows, warps=max(4, launch.warps * rows // launch.rows))


def config(architecture: int, dtype: torch.dtype, head_dim: int, direction: str, tokens: int | None = None) -> Config:
    """The launch configuration of a kernel.

    Args:
        architecture: Compute capability times ten, 0 for the interpreter.
        dtype: Of q, k and v.
        head_dim: Channels per head, at most 256.
        direction: One of `DIRECTIONS`.
        tokens: What a row tile has at most, None where it fills the rows.
    """
    rows = _TABLE[family(architecture)][direction][dtype.itemsize]
    width = min(d for d in rows if d >= head_dim)
    half = HALF.get((family(architecture), direction, dtype.itemsize), {}).get(width)
    return half if half and tokens is not None and tokens <= half.rows else rows[width]


def block_tokens(pattern: Pattern, layout: Layout) -> dict[str, int | None]:
    """Tokens that the row tiles of a dynamic pattern have at most: its blocks are their borders."""
    if not isinstance(pattern, DynamicPattern):
        return {}
    blocks = pattern.blocks(layout.grid)
    queries, keys = math.prod(blocks.queries), math.prod(blocks.keys)
    return {"forward": queries, "query_grad": queries, "key_grad": keys}
