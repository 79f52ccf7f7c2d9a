"""Models with weights from a file, and images as they want them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image, UnidentifiedImageError

import visattn.models  # noqa: F401  registers the backbones
from visattn.models.pyramid import official


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint; nothing in it is executed.

    Raises:
        ValueError: If there is no such file, or it holds more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of tensors only: {str(error).splitlines()[0]}") from None
    return official(found, torch.nn.Module())


def create_with_weights(
    name: str, checkpoint: Path | None, pretrained: bool, size: int | None, classes: int | None
) -> torch.nn.Module:
    """A model in evaluation mode with the weights of a file, or timm's.

    Args:
        name: A model of timm.
        checkpoint: The file, or None.
        pretrained: Whether to download timm's weights.
        size: Side of the images in pixels, None for the model's own.
        classes: Classes of the head, None for those of the checkpoint's head.

    Raises:
        ValueError: If timm does not know the name, or the weights do not fit the model.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r}: see `visattn models` and timm.list_models()")
    weights = read_weights(checkpoint) if checkpoint is not None else None
    kwargs: dict[str, Any] = {} if size is None else {"img_size": size}
    if weights is not None and classes is None and "head.weight" in weights:
        classes = len(weights["head.weight"])
    if classes is not None:
        kwargs["num_classes"] = classes
    try:
        model = timm.create_model(name, pretrained=pretrained and weights is None, **kwargs).eval()
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        del kwargs["img_size"]
        model = timm.create_model(name, pretrained=pretrained and weights is None, **kwargs).eval()
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} does not fit {name}: {' '.join(str(error).split())[:400]}") from None
    return model


def open_image(path: Path, model: torch.nn.Module, size: int | None) -> torch.Tensor:
    """An image as the model wants it: [1, channels, height, width].

    Raises:
        ValueError: If it is no image.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None
    options = {} if size is None else {"input_size": (3, size, size)}
    config = timm.data.resolve_data_config(options, model=model)
    return timm.data.create_transform(**config, is_training=False)(image)[None]  # type: ignore[index]


def class_name(index: int, classes: int) -> str:
    """The name of a class of ImageNet, "" for other heads."""
    return timm.data.ImageNetInfo().index_to_description(index) if classes == 1000 else ""
