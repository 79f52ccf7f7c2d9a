"""Batches of NaFlexViT and Gemma 4: samples of several grids in one padded sequence, each with a layout of its own."""

from __future__ import annotations

from typing import Any

import torch

from visattn.layout import Layout
from visattn.models.swap.runtime import Swapped

Grids = tuple[tuple[int, int], ...]


def grids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grids | str | None:
    """Rows and columns of every sample, from what an embedding got; None for images, which have one grid.

    A sample is a grid if its valid patches come first and are all of a grid, row by row; otherwise the reason.
    """
    first = args[0] if args else next(iter(kwargs.values()))
    if isinstance(first, dict):
        first, kwargs, args = first["patches"], {**kwargs, **first}, ()
    coordinates = kwargs.get("patch_coord", args[1] if len(args) > 1 else None)
    valid = kwargs.get("patch_valid", args[2] if len(args) > 2 else None)
    if coordinates is None:
        return None if first.ndim == 4 else "the batch has neither a grid nor patch coordinates"
    return _grids(coordinates, valid)


def _grids(coordinates: torch.Tensor, valid: torch.Tensor | None) -> Grids | str:
    """Rows and columns of every sample of coordinates [B, S, 2] of patches, valid where [B, S] says so."""
    length = coordinates.shape[1]
    index = torch.arange(length, device=coordinates.device)
    if valid is None:
        # Gemma 4 marks padding by coordinates of -1.
        valid = (coordinates >= 0).all(-1)
    valid = valid.bool()
    counts = valid.sum(1)
    sides = torch.where(valid[..., None], coordinates, 0).amax(1) + 1
    columns = sides[:, 1:]
    wanted = torch.stack([index // columns, index % columns], dim=-1)
    whole = (counts == sides.prod(1)) & (valid == (index < counts[:, None])).all(1)
    whole &= ((coordinates == wanted).all(-1) | ~valid).all(1)
    if not bool(whole.all()):
        return "the patches of a sample are no whole grid, row by row"
    return tuple((int(rows), int(columns)) for rows, columns in sides.tolist())


def foreign_mask(attn_mask: torch.Tensor, layouts: tuple[Layout, ...]) -> bool:
    """Whether a mask hides anything else than the padding of the samples, or shows the padding.

    Args:
        attn_mask: [B, 1, S or 1, S], bool (True is visible) or to be added to the logits.
        layouts: Of the samples.
    """
    visible = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
    lengths = torch.tensor([layout.length for layout in layouts], device=visible.device)[:, None]
    tokens = torch.arange(visible.shape[-1], device=visible.device) < lengths
    queries = tokens if visible.shape[-2] > 1 else torch.ones_like(tokens[:, :1])
    # Queries in the padding may see anything: nobody reads them.
    return bool(((visible != tokens[:, None, None]) & queries[:, None, :, None]).any())


def attend_samples(
    site: Swapped, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layouts: tuple[Layout, ...], scale: float
) -> torch.Tensor:
    """The pattern on every sample's own grid; zeros in the padding.

    Args:
        site: The module.
        q: Queries [B, heads, S, D].
        k: Keys.
        v: Values.
        layouts: Of the samples, each of at most S tokens.
        scale: Factor on the logits.
    """
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for layout in dict.fromkeys(layouts):
        rows = torch.tensor([i for i, each in enumerate(layouts) if each == layout], device=q.device)
        own_q, own_k, own_v = (t[rows, :, : layout.length] for t in (q, k, v))
        out[rows, :, : layout.length] = site.attend(own_q, own_k, own_v, layout, scale)
    return out
