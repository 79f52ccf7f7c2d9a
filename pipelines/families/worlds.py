"""World models: video families whose camera is steered while a clip is made, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST


def _sana_wm(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-3:])))


def _refined(config: Any, args: Args) -> Seen:
    """Only the rotary embedding tells where the tokens of a chunk sit."""
    parts = [_column(table, at) for at in _lowest(config) for table in args["video_rotary_emb"]]
    return Seen((), REST, 0, torch.stack(parts, dim=-1))


def _lowest(config: Any) -> range:
    """The channels of the lowest frequency, with the angles of time, rows and columns, behind the padding."""
    width = config.num_attention_heads * config.attention_head_dim
    if config.rope_type == "interleaved":
        # Each is there twice.
        return range(width % 6, width % 6 + 6, 2)
    first = width // 2 - 3 * (width // 6)
    return range(first, first + 3)


def _column(table: torch.Tensor, at: int) -> torch.Tensor:
    """A channel of a table [B, S, C], or [B, H, S, C] with channels head by head, of the first sample."""
    if table.ndim == 3:
        return table[0, :, at]
    return table[0, at // table.shape[-1], :, at % table.shape[-1]]


def _read_angles(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """From (cos, sin) of the angles of time, rows and columns [tokens, 6].

    The lowest frequency turns by half a circle from one end of what the model knows (20 seconds, 2048 pixels) to the
    other: taken from the first token on, angles rise along each axis, wherever in a long video the chunk is.
    """
    axes = ids.detach().double().cpu().unflatten(1, (3, 2)).unbind(1)
    grid = raster.whole(torch.stack([_turned(axis) for axis in axes], dim=1))
    return seen._replace(grid=grid) if grid else seen._replace(why="its rotary embedding is not that of a grid")


def _turned(axis: torch.Tensor) -> torch.Tensor:
    """Angles from that of the first token on, of (cos, sin) [tokens, 2]."""
    # Once for each angle: arithmetic on long tensors may round equal numbers to others at their end.
    different, which = axis.unique(dim=0, return_inverse=True)
    (cos, sin), (cos0, sin0) = different.unbind(1), axis[0]
    return torch.atan2(sin * cos0 - cos * sin0, cos * cos0 + sin * sin0)[which]


SANA_WM = Family(
    name="SANA-WM (softmax layers)",
    classes=("SanaWMTransformer3DModel",),
    dims=3,
    # Most layers have linear attention at the same paths.
    sites=("blocks.*.attn.attn", "blocks.*.attn.cam_attn"),
    seen=_sana_wm,
    bare=True,
)

SANA_WM_REFINER = Family(
    name="SANA-WM refiner",
    classes=("SanaWMLTX2RefinerTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_refined,
    read=_read_angles,
    wider=True,
    tokens="grid of a chunk (keys: sink and history before it)",
)

FAMILIES = (SANA_WM, SANA_WM_REFINER)
