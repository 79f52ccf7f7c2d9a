"""The coarse branch of `vsa`: attention of means, behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from visattn.kernels.fused import fused
from visattn.kernels.triton.again import First, start_like
from visattn.kernels.triton.choosing.choose import part_tokens
from visattn.kernels.triton.hybrid.gated import add_gated
from visattn.kernels.triton.hybrid.router import Pooled
from visattn.kernels.triton.hybrid.sizes import precision, sizes, strides, warps
from visattn.kernels.triton.start import launch_like
from visattn.operands import repeated
from visattn.patterns.choice.blocks import Blocks


def add_coarse(
    grid: list[torch.Tensor],
    blocks: Blocks,
    masked: bool,
    means: Pooled,
    own: Mapping[str, torch.Tensor],
) -> None:
    """VSA: attention of means, queries scaled, behind a gate."""
    q, out = grid[0], grid[3]
    query, key, value, count = means
    key, value = (repeated(x, q.shape[2], 1) for x in (key, value))
    mask = blind = None
    if masked:
        mask = count[:, None, None] > 0
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    coarse = fused(query, key, value, mask, scale=1.0)
    coarse = coarse if blind is None else coarse.masked_fill(blind, 0)
    given = [q, out, coarse.contiguous(), own["gate"].contiguous()]
    if "gate_map" in own:
        given.append(own["gate_map"].to(q.dtype).contiguous())

    def first(q: torch.Tensor, out: torch.Tensor, *learned: torch.Tensor) -> First:
        tokens = part_tokens(*blocks.sides[0], 1, q.device)
        arguments = gated_arguments(q, out, tokens, *learned)
        programs = len(tokens) * -(-tokens.shape[1] // arguments["ROWS"])
        launch_like(add_gated, (programs, q.shape[2], len(q)), arguments, warps(arguments), 1)
        return First(())

    start_like((add_gated.fn, blocks, precision(q.dtype)), given, first)


def gated_arguments(
    q: torch.Tensor,
    out: torch.Tensor,
    tokens: torch.Tensor,
    coarse: torch.Tensor,
    gate: torch.Tensor,
    gate_map: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of `add_gated`.

    Args:
        q: Grid queries [B, tokens, H, F].
        out: The softmax branch [B, tokens, H, D].
        tokens: Queries of each block.
        coarse: [B, H, blocks, D].
        gate: float32 [H, D].
        gate_map: [H, F, D] in the dtype of q, or None.
    """
    return {
        "q": q, "coarse": coarse, "gate": gate, "gate_map": gate if gate_map is None else gate_map,
        "out": out, "tokens": tokens,
        **strides("q", q), **strides("out", out), "heads": q.shape[2], "groups": len(tokens),
        "slots": tokens.shape[1], **sizes(q.shape[3], out.shape[3], q.dtype), "MAP": gate_map is not None,
    }  # fmt: skip
