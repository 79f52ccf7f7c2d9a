"""How the tokens of ComfyUI's native models are ordered, by the class of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from visattn.runtime.where import REST, Where


@dataclass(frozen=True)
class Record:
    """One class of models, and those derived from it.

    Attributes:
        name: The class.
        models: Which models have it, for people.
        patch: Latents of a token per axis; "" for none, else the attribute of the model that tells.
        dims: Axes of the grid.
        prefix: Tokens before the grid, REST for the text.
        suffix: Tokens after the grid, REST for text or references.
        levels: How an odd grid is halved from level to level, "ceil" or "floor"; "" if it is not.
        reference: Argument of the forward whose latents' tokens precede the grid; "" for none.
        text_first: Whether the text precedes the grid, and references follow it where there are any.
        around: Wrappers that ComfyUI calls around a forward: of the class itself, or, where the class calls none, of
            what holds it.
    """

    name: str
    models: str
    patch: str = "patch_size"
    dims: int = 2
    prefix: int = 0
    suffix: int = 0
    levels: str = ""
    reference: str = ""
    text_first: bool = False
    around: str = "diffusion_model"


RECORDS = (
    Record("UNetModel", "Stable Diffusion 1, 2 and XL", patch="", levels="ceil"),
    Record("Flux", "FLUX.1, FLUX.1 Kontext", prefix=REST, text_first=True),
    Record("Chroma", "Chroma1", prefix=REST),
    Record("NextDiT", "Lumina Image 2", prefix=REST),
    Record("MMDiT", "Stable Diffusion 3 and 3.5, AuraFlow", prefix=REST, around="apply_model"),
    Record("QwenImageTransformer2DModel", "Qwen-Image, Qwen-Image Edit", prefix=REST, text_first=True),
    Record("WanModel", "Wan 2.1 and 2.2", dims=3),
    Record("HunyuanVideo", "HunyuanVideo, HunyuanImage 2.1", dims=3, suffix=REST, reference="ref_latent"),
)


def record_of(model: object) -> Record | None:
    """The record of a model's class or the nearest class it derives from, None if there is none."""
    for kind in type(model).__mro__:
        found = next((record for record in RECORDS if record.name == kind.__name__), None)
        if found is not None:
            # Classes of video models are those of images where their patches have two sides.
            sizes = getattr(model, found.patch, None) if found.patch else None
            return replace(found, dims=2) if isinstance(sizes, tuple | list) and len(sizes) == 2 else found
    return None


def where(record: Record, model: Any, x: torch.Tensor, given: Mapping[str, Any]) -> Where:
    """Where the tokens of a forward sit.

    Args:
        record: Of the model's class.
        model: The model.
        x: Latents [B, C, (T,) H, W].
        given: Other arguments of its forward by name.
    """
    padded = getattr(model, "pad_tokens_multiple", None)
    if padded:
        # Z-Image has the class of Lumina 2 in later versions.
        return Where((), why=f"it pads its text and its grid to multiples of {padded} tokens")
    sides = tuple(int(n) for n in x.shape[2:])
    if record.dims == 2 and len(sides) == 3 and sides[0] == 1:
        # Image models that share the latents of video models.
        sides = sides[1:]
    if len(sides) != record.dims:
        return Where((), why=f"its latents {list(x.shape)} do not have {record.dims} axes")
    sizes = _patch(getattr(model, record.patch) if record.patch else 1, record.dims)
    grid = _tokens(sides, sizes)
    prefix, suffix = record.prefix, record.suffix
    reference = given.get(record.reference)
    if reference is not None:
        prefix += math.prod(_tokens(reference.shape[2:], sizes))
    if record.text_first and given.get("ref_latents"):
        context = given.get("context")
        if context is None:
            return Where((), why="it has reference images, and its forward does not name its text")
        prefix, suffix = int(context.shape[1]), REST
    return Where(grid, prefix, suffix, record.levels)


def _tokens(sides: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each axis; latents are padded up to whole patches."""
    return tuple(-(-int(n) // p) for n, p in zip(sides, sizes, strict=True))


def _patch(size: Any, dims: int) -> tuple[int, ...]:
    """Latents of a token per axis, from one number for the two axes of an image or one for each axis."""
    if isinstance(size, tuple | list):
        return tuple(int(n) for n in size)[-dims:]
    return (1,) * (dims - 2) + (int(size),) * 2
