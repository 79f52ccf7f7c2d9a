"""Where a run stands: its checkpoint, which is whole or absent, and its result."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.distill.samples import save_tensors
from scripts.distill.settings import CHANGEABLE, RunConfig
from scripts.distill.sharing import like, whole
from visattn.files import opened, written_whole

Tensors = Mapping[str, torch.Tensor]


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: Steps that are done.
        seconds: Seconds that they took.
        began: Steps that were done when its stage began.
    """

    step: int = 0
    seconds: float = 0.0
    began: int = 0


def save_checkpoint(
    path: Path,
    config: RunConfig,
    done: Progress,
    trained: Tensors,
    average: Tensors,
    optimizer: torch.optim.Optimizer,
    writes: bool = True,
) -> None:
    """Writes all that a resumed run needs into one safetensors file; a kill leaves the older file whole.

    Args:
        path: The file.
        config: Settings.
        done: How far the run is.
        trained: The parameters that learn.
        average: Their averages.
        optimizer: Their optimizer.
        writes: Whether this process writes; the others help where all have parts of the tensors.
    """
    state = optimizer.state_dict()
    tensors = {f"trained.{name}": whole(value) for name, value in trained.items()}
    check_finite(tensors, done.step)
    tensors |= {f"average.{name}": whole(value) for name, value in average.items()}
    plain: dict[str, Any] = {}
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{i}.{key}"] = whole(value)
            else:
                plain[f"{i}.{key}"] = value
    if not writes:
        return
    groups = [{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in g.items()} for g in state["param_groups"]]
    known = {"config": config.to_json(), **done._asdict(), "plain": plain, "groups": groups}
    save_tensors(path, tensors, {"run": json.dumps(known)})


def _opened(path: Path) -> AbstractContextManager[Any]:
    return opened(path, "checkpoint of a distillation", "pass --no-resume to begin anew, or another --out", "run")


def load_checkpoint(path: Path, trained: Tensors, average: Tensors, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores what `save_checkpoint` wrote, in place; returns how far the run is."""
    with _opened(path) as file:
        known = json.loads(file.metadata()["run"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for part, own in (("trained", trained), ("average", average)):
            for name, value in own.items():
                value.copy_(like(tensors[f"{part}.{name}"], value))
    state: dict[int, dict[str, Any]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            i, name = key.removeprefix("optimizer.").split(".", 1)
            own = parameters[int(i)]
            state.setdefault(int(i), {})[name] = like(value, own) if value.shape == own.shape else value
    for key, value in known["plain"].items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": known["groups"]})
    return Progress(known["step"], known["seconds"], known["began"])


def check_resume(path: Path, config: RunConfig, unknown: Collection[str] = ()) -> int:
    """Steps that a checkpoint has done; for a run that is about to go on, before any model is loaded.

    Args:
        path: The checkpoint.
        config: Settings.
        unknown: Names of those that are not compared.

    Raises:
        ValueError: If the run was started with other settings, `CHANGEABLE` ones aside.
    """
    with _opened(path) as file:
        known = json.loads(file.metadata()["run"])
    then, now = known["config"], config.to_json()
    compared = now.keys() - CHANGEABLE - {*unknown}
    other = [f"{k} {then.get(k)!r} then, {v!r} now" for k, v in now.items() if k in compared and then.get(k) != v]
    if other:
        raise ValueError(f"{path} is from another run ({'; '.join(other)}): pass --no-resume or another --out")
    return known["step"]


def check_finite(tensors: Tensors, step: int) -> None:
    """Refuses to keep weights that are of no use, so that an older checkpoint stays.

    Raises:
        ValueError: If a tensor has a value that is infinite or no number.
    """
    wrong = [name for name, value in tensors.items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{wrong[0]} is not finite after {step} steps: the training has diverged, lower --lr")


def trim_log(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run does again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with written_whole(path) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step))
