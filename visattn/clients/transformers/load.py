"""Image classifiers of transformers from a folder or the hub, and images as they want them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def is_of_transformers(name: str) -> bool:
    """Whether a model's name is a folder that `save_pretrained` wrote, or that of a repository "owner/name"."""
    return (Path(name) / "config.json").is_file() or (name.count("/") == 1 and not Path(name).exists())


def load_classifier(name: str, download: bool) -> tuple[torch.nn.Module, Any]:
    """A classifier in evaluation mode, and what prepares its images.

    Args:
        name: A folder, or a repository of the hub.
        download: Whether a repository may be downloaded.

    Raises:
        ValueError: If it is neither, is not to be downloaded, or is no classifier of images with safetensors.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    local = Path(name).is_dir()
    if not local and not download:
        raise ValueError(f"{name} is no folder here: pass --pretrained to download it from the hub, or a folder")
    try:
        model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, local_files_only=local)
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        text = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} is no classifier of images that transformers loads from safetensors: {text}"
        ) from None
    return model.eval(), processor


def as_pixels(image: Any, processor: Any, size: int | None) -> dict[str, torch.Tensor]:
    """Arguments of a classifier's forward for an image in RGB, of `size` pixels per side or the model's own."""
    options: dict[str, Any] = {}
    if size is not None:
        sides = {"height": size, "width": size}
        options = {"size": sides, "crop_size": sides}
    return {"pixel_values": processor(image, return_tensors="pt", **options)["pixel_values"]}


def label(model: Any, index: int) -> str:
    """What a class is called, "" if it only has a number."""
    text = str(model.config.id2label.get(index, ""))
    return "" if text == f"LABEL_{index}" else text
