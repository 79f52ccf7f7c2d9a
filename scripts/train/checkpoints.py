"""Checkpoints of a training: float16 weights in files small enough to travel, each of which knows its set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visattn.files import opened, written_whole

FILE_BYTES = 15_000_000


def save_parts(stem: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> list[Path]:
    """Writes tensors in float16 as STEM-0.safetensors and so on, each at most FILE_BYTES.

    Every file carries `about` and how many there are; files of an older, longer set are removed. All are written before
    the first takes its place, so that whenever the process is killed one of both sets can be read.
    """
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        half = value.detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise ValueError(f"{name} is not finite in float16: the training has diverged")
        if size + half.nbytes > FILE_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = half
        size += half.nbytes
    paths = [stem.with_name(f"{stem.name}-{i}.safetensors") for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        with written_whole(_coming(path)) as temporary:
            save_file(part, temporary, {"about": json.dumps(dict(about)), "parts": str(len(parts))})
    for path in paths:
        _coming(path).replace(path)
    for old in set(stem.parent.glob(f"{stem.name}-*.safetensors")) - set(paths):
        old.unlink()
    return paths


def load_parts(stem: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_parts` wrote: float32 tensors and `about`.

    Raises:
        ValueError: If a file is missing or belongs to another set.
    """
    tensors: dict[str, torch.Tensor] = {}
    first, count, index = None, 1, 0
    while index < count:
        path = stem.with_name(f"{stem.name}-{index}.safetensors")
        metadata, part = _read(path, count)
        if first is not None and metadata != first and _coming(path).is_file():
            # Killed between the first that took its place and this one.
            metadata, part = _read(_coming(path), count)
        if first is not None and metadata != first:
            raise ValueError(f"{path} is of another checkpoint than {stem.name}-0.safetensors: carry files of one run")
        tensors |= part
        first, count, index = metadata, int(metadata["parts"]), index + 1
    assert first is not None
    return tensors, json.loads(first["about"])


def _coming(path: Path) -> Path:
    """Where a file waits until its whole set is written."""
    return path.with_name(f"{path.name}.next")


def _read(path: Path, count: int) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a file says about its set, and its tensors in float32."""
    path = path if path.is_file() or not _coming(path).is_file() else _coming(path)
    with opened(path, "part of a checkpoint", f"a checkpoint of {count} files needs all of them", "parts") as file:
        return file.metadata(), {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118


def load_exported(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a pipeline folder, under the names of `weights_of`."""
    files = {
        "transformer": folder / "transformer" / "diffusion_pytorch_model.safetensors",
        "text_encoder": folder / "text_encoder" / "model.safetensors",
    }
    return {f"{part}.{k}": v.float() for part, file in files.items() for k, v in load_file(file).items()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, each once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives a model the weights of `weights_of`.

    Raises:
        ValueError: If they are not the model's.
    """
    own = weights_of(model)
    other = sorted(set(own) ^ set(weights)) or [name for name in own if own[name].shape != weights[name].shape]
    if other:
        raise ValueError(f"the weights are of another model: {other[0]} differs")
    for name, value in own.items():
        value.copy_(weights[name])
