"""How long the Triton kernels take on a GPU that is not there: tiles times a rate per tile.

time = (tiles without mask + PARTIAL * tiles with one) * operations of a tile / rate + CALL. What was measured and what
is assumed about a GPU stands in its record; scripts/bench/gpu.py measures both rates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from visattn.kernels.triton.boxes import PARTIAL, QUERY_HALVES, tiled
from visattn.kernels.triton.config import config
from visattn.kernels.triton.hopper.launch import hopper_config, width
from visattn.layout import Layout
from visattn.patterns import Pattern, parse
from visattn.plans import check_listed

# Milliseconds of a call besides its tiles: measured on calls that wait in a queue, which hides most of the host's.
CALL = 0.1
# Time of a tile with mask over one without in the Hopper kernels, whose halves leave out what they do not see: fitted
# to docs/results/h200.json. What `auto` chooses by has the larger PARTIAL there too: it errs on the side of dense
# attention in short calls.
HOPPER_PARTIAL = 1.15


@dataclass(frozen=True)
class Gpu:
    """Rates of bfloat16 attention on a GPU, in TFLOP/s.

    Attributes:
        architecture: Compute capability times ten.
        dense: Of the library's dense attention.
        general: Of tiles without mask in the general kernel.
        hopper: The same in the Hopper kernel, 0 where it does not run.
        basis: Where the rates come from.
    """

    architecture: int
    dense: float
    general: float
    hopper: float
    basis: str

    @classmethod
    def assumed(cls, architecture: int, peak: float) -> Gpu:
        """Rates of a GPU that was not measured, from the dense bfloat16 peak of its data sheet in TFLOP/s."""
        basis = f"assumed: 0.65 of the {peak:g} TFLOP/s of its data sheet for dense attention, 0.6 of that for tiles"
        return cls(architecture, 0.65 * peak, 0.6 * 0.65 * peak, 0.0, basis)


GPUS = {
    "h100": Gpu(90, 610, 390, 595, "measured on an H100 80GB with torch 2.11 and triton 3.6 (docs/performance.md)"),
    "h200": Gpu(90, 610, 390, 595, "measured on an H200 with torch 2.11 and triton 3.6 (docs/performance.md)"),
    "a100": Gpu.assumed(80, 312),
    "l40s": Gpu.assumed(89, 362),
    "rtx4090": Gpu.assumed(89, 165),
    "rtx5090": Gpu.assumed(120, 210),
    "b200": Gpu.assumed(100, 2250),
}


@dataclass(frozen=True)
class Estimate:
    """Expected time of one forward.

    Attributes:
        gpu: Name of the GPU.
        kernel: "hopper" or "general".
        query_tile: Box of tokens per query tile.
        key_tile: Box of tokens per key tile.
        tile_bound: How many times fewer operations than dense attention the visited tiles need.
        full_share: Share of the visited tile pairs that need no mask.
        milliseconds: Of the pattern.
        dense_milliseconds: Of dense attention on the same tokens.
        basis: Where the rates come from.
    """

    gpu: str
    kernel: str
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]
    tile_bound: float
    full_share: float
    milliseconds: float
    dense_milliseconds: float
    basis: str

    @property
    def ratio(self) -> float:
        """How many times faster than dense attention."""
        return self.dense_milliseconds / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        partial = HOPPER_PARTIAL if self.kernel == "hopper" else PARTIAL
        return dataclasses.asdict(self) | {"ratio": self.ratio, "partial_weight": partial, "call_milliseconds": CALL}


def estimate(
    pattern: Pattern | str, layout: Layout, gpu: str = "h100", *, batch: int = 1, heads: int = 24, head_dim: int = 128
) -> Estimate:
    """Estimate the forward of a pattern in bfloat16.

    Args:
        pattern: A list of tiles, or its text.
        layout: The tokens.
        gpu: One of `GPUS`.
        batch: Batch size.
        heads: Query heads.
        head_dim: Channels per head, at most 256.

    Raises:
        ValueError: If the GPU has no record, the head dim is too large, or the pattern is no list of tiles.
    """
    pattern = parse(pattern)
    check_listed(pattern)
    if gpu not in GPUS:
        raise ValueError(f"gpu {gpu!r} has no record: pass one of {', '.join(GPUS)}")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head_dim {head_dim} is not from 1 to 256, which the kernels take")
    record = GPUS[gpu]
    launch, rate, kernel = config(record.architecture, torch.bfloat16, head_dim, "forward"), record.general, "general"
    faster = hopper_config(record.architecture, torch.bfloat16, head_dim, pattern, layout) if record.hopper else None
    if faster is not None:
        launch, rate, kernel = faster, record.hopper * head_dim / width(head_dim), "hopper"
    plan = tiled(pattern, layout, launch.rows, launch.tile, QUERY_HALVES if launch.halves else None)
    operations = 4.0 * batch * heads * head_dim * layout.pairs
    weight = 1 + ((PARTIAL if faster is None else HOPPER_PARTIAL) - 1) * (1 - plan.full_share)
    return Estimate(
        gpu=gpu,
        kernel=kernel,
        query_tile=plan.queries.shape,
        key_tile=plan.keys.shape,
        tile_bound=plan.tile_bound,
        full_share=plan.full_share,
        milliseconds=operations / plan.tile_bound * weight / rate / 1e9 + CALL,
        dense_milliseconds=operations / record.dense / 1e9,
        basis=record.basis,
    )
