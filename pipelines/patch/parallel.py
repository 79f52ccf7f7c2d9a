"""Ulysses context parallelism: every device has a part of the tokens, and for the attention all tokens of some heads.

Joint models split the text before the grid, and the grid with the reference images behind it, each by itself, so the
exchanged sequence is [text 0, image 0, text 1, image 1, ...]; a pattern needs each of them in one piece.
"""

from __future__ import annotations

from typing import Any

import torch

from visattn.layout import Layout

MORE_KEYS = "it has keys beyond its queries"
OWN_HEADS = "its heads have patterns of their own, and a device has a part of them: use apply(parallel='ulysses')"
SPLIT_MASK = "its mask is split over devices"


def degree(config: Any) -> int:
    """Devices that share a sequence under diffusers' parallel configuration; 1 where none do.

    Raises:
        ValueError: If they share it in a way that no pattern can run in.
    """
    context = getattr(config, "context_parallel_config", None)
    if context is None:
        return 1
    if context.ring_degree > 1:
        raise ValueError(
            f"ring context parallelism (ring_degree={context.ring_degree}) shows a device the keys piece by piece, and "
            "a pattern needs all of them at once: pass apply(..., parallel='halo'), which fetches what it lists, "
            "ContextParallelConfig(ulysses_degree=...), or call handle.remove()"
        )
    if getattr(context, "ulysses_anything", False):
        raise ValueError(
            "ulysses_anything=True splits tokens and heads unevenly, which patterns do not follow: pass "
            "apply(..., parallel='ulysses'), which cuts the grid in slabs instead, or leave it out"
        )
    return context.ulysses_degree


def whole(x: torch.Tensor, devices: int) -> torch.Tensor:
    """The shape of x [B, S / devices, H, D] after the exchange, as a tensor without data: [B, S, H / devices, D]."""
    batch, tokens, heads, dim = x.shape
    return torch.empty(batch, tokens * devices, heads // devices, dim, dtype=x.dtype, device="meta")


def uneven(layouts: tuple[Layout, ...], heads: int, devices: int) -> str:
    """Why a sequence with such layouts (one of each sample where they differ) cannot be exchanged, empty if it can."""
    layout, *others = layouts
    if others:
        return "its samples have different grids or text of different length"
    if layout.suffix and not layout.prefix:
        return "its text follows the grid, and how devices share that is not known"
    for name, number in (("text", layout.prefix), ("grid and references", layout.tokens + layout.suffix)):
        if number % devices:
            return f"its {name} of {number} tokens cannot be split evenly over {devices} devices"
    return f"its {heads} heads cannot be split evenly over {devices} devices" if heads % devices else ""


def gather(x: torch.Tensor, layout: Layout, config: Any) -> torch.Tensor:
    """Exchange x [B, S / devices, H, D]: the tokens of `layout` for a part of the heads, [B, S, H / devices, D]."""
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    devices, group = degree(config), config.context_parallel_config._ulysses_mesh.get_group()
    mixed: Any = SeqAllToAllDim.apply(group, x, 2, 1)
    parts = mixed.unflatten(1, (devices, -1)).split(_sizes(layout, devices), 2)
    return torch.cat([part.flatten(1, 2) for part in parts], 1)


def scatter(x: torch.Tensor, layout: Layout, config: Any) -> torch.Tensor:
    """The inverse of `gather`."""
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    devices, group = degree(config), config.context_parallel_config._ulysses_mesh.get_group()
    parts = x.split([size * devices for size in _sizes(layout, devices)], 1)
    mixed = torch.cat([part.unflatten(1, (devices, -1)) for part in parts], 2).flatten(1, 2)
    out: Any = SeqAllToAllDim.apply(group, mixed, 1, 2)
    return out


def _sizes(layout: Layout, devices: int) -> list[int]:
    """Tokens of the text, and of grid and references, on one device."""
    return [layout.prefix // devices, (layout.tokens + layout.suffix) // devices]
