"""What a run that was stopped goes on from, in one file, and the pipeline folder that it leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from visattn.files import opened, written_whole


def save_run(
    path: Path,
    config: Any,
    about: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes everything that a resumed run needs into one safetensors file, or leaves the old file whole.

    Args:
        path: The file.
        config: A dataclass, the settings of the run.
        about: What else `load_run` is to give back; "config" is taken.
        modules: Whose states are written, by name; "optimizer" is taken.
        optimizer: Its state is written too.
    """
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    metadata = {"config": json.dumps(asdict(config)), **about}
    with written_whole(path) as temporary:
        save_file({k: v.detach().cpu().clone() for k, v in tensors.items()}, temporary, metadata)


def load_run(
    path: Path,
    config: Any,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    changeable: Collection[str] = (),
) -> dict[str, str]:
    """Restores what `save_run` wrote; returns what it was told besides.

    Args:
        path: The file.
        config: The settings of this run.
        modules: As they were written.
        optimizer: Of the same parameters.
        changeable: Settings that a resumed run may have others of.

    Raises:
        ValueError: If the file is not whole, or the run was started with other settings.
    """
    metadata, tensors = read_run(path, "pass --no-resume to begin anew, or another --out")
    then, now = json.loads(metadata["config"]), asdict(config)
    other = [f"{k} {then.get(k)!r} then, {now[k]!r} now" for k in now if k not in changeable and then.get(k) != now[k]]
    if other:
        raise ValueError(f"{path} is from another run ({'; '.join(other)}): pass --no-resume or another --out")
    for name, module in modules.items():
        module.load_state_dict(part(tensors, name))
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part(tensors, "optimizer").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata


def read_run(path: Path, fix: str, only: str = "") -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a file of `save_run` tells, "config" as JSON, and its tensors, of one module if `only` names it.

    Raises:
        ValueError: If the file is no whole one of these; `fix` says what to do.
    """
    with opened(path, "checkpoint", fix, "config") as file:
        keys = [key for key in file.keys() if not only or key.startswith(f"{only}.")]  # noqa: SIM118
        return file.metadata(), {key: file.get_tensor(key) for key in keys}


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The state of one module."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> int:
    """Writes a pipeline in diffusers' folder format in the place of an older one; returns its size in bytes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
