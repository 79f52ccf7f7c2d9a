"""Models that ship inside the package: their names and how to load them, without any network.

Heavy libraries are imported when a model is loaded, not with this module: the CLI only needs the names.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


_HERE = "visattn.pipelines.embedded"
# The classes of pipelines on pixels, "module:class": diffusers finds them by name, see visattn.discovery.
PIPELINES = (
    f"{_HERE}.pixel_dit:PixelDiTPipeline",
    f"{_HERE}.pixel_wan:PixelWanPipeline",
    f"{_HERE}.pixel_flux:PixelFluxPipeline",
    f"{_HERE}.pixel_wan_text:PixelWanTextPipeline",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """What is known about an embedded model without loading it.

    Attributes:
        name: The name a user types.
        kind: "image" or "video".
        pipeline: Import path of the pipeline class, "module:class".
        classes: Number of class labels; None of a model that takes prompts.
        size: Size it was trained at: (height, width) or (frames, height, width), in pixels.
        grid: Tokens on each axis at that size.
        summary: One line for lists.
    """

    name: str
    kind: str
    pipeline: str
    classes: int | None = None
    size: tuple[int, ...]
    grid: tuple[int, ...]
    summary: str

    @property
    def folder(self) -> Path:
        """Folder with the weights in diffusers' format."""
        return Path(__file__).parent / "weights" / self.name


_DIGITS = EmbeddedModel(
    name="digits",
    kind="image",
    pipeline=f"{_HERE}.pixel_dit:PixelDiTPipeline",
    classes=10,
    size=(64, 64),
    grid=(32, 32),
    summary="for tests: handwritten digits 0-9, 64x64 px, 1024 tokens, 5-layer pixel DiT",
)

_MOVING_DIGITS = EmbeddedModel(
    name="moving-digits",
    kind="video",
    pipeline=f"{_HERE}.pixel_wan:PixelWanPipeline",
    classes=10,
    size=(16, 32, 32),
    grid=(16, 16, 16),
    summary="for tests: moving digits 0-9, 16 frames of 32x32 px, 4096 tokens, 6-layer pixel Wan transformer",
)

_EMOJI = EmbeddedModel(
    name="emoji",
    kind="image",
    pipeline=f"{_HERE}.pixel_flux:PixelFluxPipeline",
    size=(256, 256),
    grid=(64, 64),
    summary="emoji from prompts, 256x256 px, 4096 tokens and 32 of text, 11-block pixel FLUX transformer",
)

_ANIMOJI = EmbeddedModel(
    name="animoji",
    kind="video",
    pipeline=f"{_HERE}.pixel_wan_text:PixelWanTextPipeline",
    size=(16, 64, 64),
    grid=(16, 16, 16),
    summary="moving emoji from prompts, 16 frames of 64x64 px, 4096 tokens, 7-block pixel Wan transformer",
)

EMBEDDED = MappingProxyType({model.name: model for model in (_DIGITS, _MOVING_DIGITS, _EMOJI, _ANIMOJI)})


def embedded_models() -> tuple[str, ...]:
    """Names that `load_embedded` takes."""
    return tuple(EMBEDDED)


def load_embedded(name: str, *, torch_dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Loads an embedded model; the weights are in the package and nothing is downloaded.

    Args:
        name: One of `embedded_models()`.
        torch_dtype: Type of the weights in memory; float32 by default (they are stored as float16).

    Raises:
        ValueError: If no embedded model has this name.
        FileNotFoundError: If the installation lacks the weights.
    """
    if name not in EMBEDDED:
        raise ValueError(f"unknown embedded model {name!r}: pass one of {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    if not (model.folder / "model_index.json").is_file():
        raise FileNotFoundError(f"no weights for {name!r} in {model.folder}: reinstall visattn with its package data")

    import warnings

    import torch

    module, cls = model.pipeline.split(":")
    pipeline_class = getattr(import_module(module), cls)
    with warnings.catch_warnings():
        # Newer diffusers call it dtype; older ones would ignore that name.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        # In from_pretrained, not by to(): layers that the model keeps in float32 stay so.
        return pipeline_class.from_pretrained(
            model.folder, torch_dtype=torch_dtype or torch.float32, local_files_only=True, use_safetensors=True
        )
