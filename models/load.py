"""Models with weights from a file, and images as they want them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file

import visattn.models  # noqa: F401  registers the backbones
from visattn.models.backbones.factory import official


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint; nothing in it is executed.

    Raises:
        ValueError: If there is no such file, or it holds more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: name a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        # torch's own message advises to execute what the file holds.
        raise ValueError(
            f"{path} is no checkpoint of tensors only: pass .safetensors, or a .pth that torch.load(weights_only=True) "
            "reads"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, not the tensors of a model by name: save its state_dict()"
        )
    return official(found, torch.nn.Module())


def check_known(name: str) -> None:
    """Raise a ValueError that names the nearest ones if timm knows no model of a name."""
    if timm.is_model(name):
        return
    names = timm.list_models()
    # Who knows the family alone gives the beginning of many long names.
    begun = sorted((each for each in names if name and each.startswith(name)), key=len)
    near = [*begun, *difflib.get_close_matches(name, names, 3, 0.7)]
    near = list(dict.fromkeys(near))[:3]
    said = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has all names"
    raise ValueError(f"timm knows no model {name!r}: {said}")


def create_with_weights(
    name: str, checkpoint: Path | None, pretrained: bool, size: int | None, classes: int | None
) -> torch.nn.Module:
    """A model in evaluation mode with the weights of a file, or timm's.

    Args:
        name: A model of timm.
        checkpoint: The file, or None.
        pretrained: Whether to download timm's weights if there is no file.
        size: Side of the images in pixels, None for the model's own.
        classes: Classes of the head, None for those of the checkpoint's head.

    Raises:
        ValueError: If timm does not know the name or its weights, or those of the file do not fit the model.
    """
    check_known(name)
    if pretrained and checkpoint is None and not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
        raise ValueError(f"there are no weights of {name} to download: pass those of a file with --checkpoint")
    weights = read_weights(checkpoint) if checkpoint is not None else None
    kwargs: dict[str, Any] = {} if size is None else {"img_size": size}
    if weights is not None and classes is None:
        classes = _classes_of(weights, name)
    if classes is not None:
        kwargs["num_classes"] = classes
    downloads = pretrained and weights is None
    try:
        model = _created(name, downloads, kwargs)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        del kwargs["img_size"]
        model = _created(name, downloads, kwargs)
    if weights is not None:
        try:
            model.load_state_dict(fitted(weights, model))
        except RuntimeError:
            raise ValueError(f"{checkpoint} does not fit {name}: {_difference(weights, model)}") from None
    return model


def _created(name: str, downloads: bool, kwargs: dict[str, Any]) -> torch.nn.Module:
    try:
        return timm.create_model(name, pretrained=downloads, **kwargs).eval()
    except OSError as error:
        if not downloads:
            raise
        why = " ".join(str(error).split())
        raise ValueError(
            f"the weights of {name} cannot be had ({why}): pass those of a file with --checkpoint"
        ) from None


def _classes_of(weights: dict[str, Any], name: str) -> int | None:
    """How many classes the head in the weights has, None if there is none under the name that timm's model gives it."""
    config = timm.get_pretrained_cfg(name)
    heads = getattr(config, "classifier", None) or "head"
    key = f"{heads if isinstance(heads, str) else heads[0]}.weight"
    return len(weights[key]) if key in weights else None


def fitted(weights: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Weights with positions resampled for the model's image size, by the filter of the model's family in timm."""
    own = model.state_dict()
    same = own.keys() == weights.keys()
    if same and any(weights[key].shape != value.shape for key, value in own.items() if "pos" in key):
        family = sys.modules[type(model).__module__]
        if hasattr(family, "checkpoint_filter_fn"):
            return family.checkpoint_filter_fn(weights, model)
    return weights


def _difference(weights: dict[str, Any], model: torch.nn.Module) -> str:
    """What keeps weights from fitting a model, in a line."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    shapes = [
        f"{key} is {list(weights[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in weights and hasattr(weights[key], "shape") and weights[key].shape != value.shape
    ]
    lines = []
    for what, found in (("it has no", missing), ("the model has no", unknown), ("other shapes:", shapes)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            lines.append(f"{what} {', '.join(found[:3])}{more}")
    return "; ".join(lines)


def open_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        ValueError: If there is no such file, or it is no image.
    """
    if not path.is_file():
        what = f"{path} is a folder, not an image" if path.exists() else f"image {path} does not exist"
        raise ValueError(f"{what}: name an image file")
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None


def as_input(image: Image.Image, model: torch.nn.Module, size: int | None) -> torch.Tensor:
    """An image as the model wants it: [1, channels, height, width], of `size` pixels per side or the model's own."""
    options = {} if size is None else {"input_size": (3, size, size)}
    config = timm.data.resolve_data_config(options, model=model)
    return timm.data.create_transform(**config, is_training=False)(image)[None]  # type: ignore[index]


def class_name(index: int, classes: int) -> str:
    """The name of a class of ImageNet, "" for other heads."""
    return timm.data.ImageNetInfo().index_to_description(index) if classes == 1000 else ""


@contextmanager
def said_by_timm(name: str, size: int | None) -> Iterator[None]:
    """Turns the assertions with which timm refuses an image size into a ValueError that names model and size."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"{name} does not take images of {size or 'this'} pixels per side: {error}") from None
