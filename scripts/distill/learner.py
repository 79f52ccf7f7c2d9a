"""What every student has: a copy of the teacher with other attention, and which of its parameters learn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from scripts.distill.losses import Rows, map_distance
from scripts.distill.settings import RunConfig
from visattn import apply, convert_heads
from visattn.handle import Handle
from visattn.pipelines.trained import Trained

LORA = "default"


class Learner(nn.Module):
    """Teacher and student; a forward gives the losses of a batch, so that it can be wrapped to run on many GPUs.

    A subclass adds LoRA or lets parameters learn, applies the pattern with `swap`, and says what a forward does.

    Args:
        teacher: The model, on the device.
        config: Settings.
    """

    def __init__(self, teacher: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.student = copy.deepcopy(teacher).float().requires_grad_(False)
        if config.heads is not None:
            convert_heads(self.student, **config.heads)
        # In a list: the teacher is no part of what is trained, moved or saved.
        self._teacher = [teacher.requires_grad_(False)]
        self._rows = [Rows(), Rows()]

    @property
    def teacher(self) -> nn.Module:
        """The frozen original."""
        return self._teacher[0]

    def swap(self, parallel: str | None = None, mesh: Any = None) -> Handle:
        """Gives the student its attention, and registers what the pattern itself brings.

        Args:
            parallel: How processes share its tokens, and the teacher's.
            mesh: Which processes.
        """
        config = self.config
        self.handle = apply(
            self.student,
            config.pattern,
            layers=config.layers,
            dense_layers=config.dense_layers,
            backend=config.backend,
            strict=True,
            parallel=parallel,
            mesh=mesh,
        )
        if parallel:
            apply(self.teacher, "dense", parallel=parallel, mesh=mesh)
        self.own = self.handle.parameters
        return self.handle

    def watch_rows(self, sites: list[str]) -> None:
        """Lets attention rows be kept, of the teacher (dense by visattn from now on) and of the student."""
        # Not "dense", and with a backend: a timm model would run its own attention, which cannot be watched.
        teacher_handle = apply(self.teacher, dict.fromkeys(sites, "na(window=-1)"), backend="sdpa", strict=True)
        for handle, rows in zip((teacher_handle, self.handle), self._rows, strict=True):
            handle.watch(rows)

    def row_distance(self) -> torch.Tensor:
        """Distance of the attention rows of the last forward of both.

        Raises:
            ValueError: If there were none.
        """
        ours, theirs = (rows.kept for rows in reversed(self._rows))
        if not theirs or ours.keys() != theirs.keys():
            raise ValueError("--maps cannot see the attention rows of this model (a position bias, say): leave it out")
        return map_distance(ours, theirs)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name: "student." and "own." before their paths.

        Raises:
            ValueError: If there is none.
        """
        found = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError(
                f"--train none leaves nothing to train: {self.config.pattern} has no parameters of its own"
            )
        return found


def add_lora(model: nn.Module, paths: list[str], config: RunConfig) -> list[str]:
    """Puts LoRA on the linear layers at some paths; returns the paths."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        alpha = config.lora_alpha or config.lora
        lora = LoraConfig(r=config.lora, lora_alpha=alpha, target_modules=paths)  # type: ignore[arg-type]
        inject_adapter_in_model(lora, model, adapter_name=LORA)
    return paths


def as_trained(tensors: dict[str, torch.Tensor], config: Any, step: int) -> Trained:
    """The trained tensors of a learner in the form of their file."""
    own = {name.removeprefix("own."): value for name, value in tensors.items() if name.startswith("own.")}
    student = {n.removeprefix("student."): value for n, value in tensors.items() if n.startswith("student.")}
    first = f".lora_A.{LORA}.weight"
    lora = {
        name.removesuffix(first): (value, student[name.replace(".lora_A.", ".lora_B.")])
        for name, value in student.items()
        if name.endswith(first)
    }
    whole = {} if lora else student
    about = {
        "model": config.model,
        "pattern": config.pattern,
        "layers": config.layers,
        "dense_layers": config.dense_layers,
        "heads": config.heads,
        "steps": step,
        "lora_scale": (config.lora_alpha or config.lora) / config.lora if config.lora else 1.0,
    }
    return Trained(whole, lora, own, about)
