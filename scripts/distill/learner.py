"""What every student has: a copy of the teacher with other attention, and which of its parameters learn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.distill.losses import Rows, map_distance
from scripts.distill.settings import RunConfig
from scripts.distill.sharing import like
from visattn import apply, convert_heads
from visattn.handle import Handle
from visattn.trained import Trained, load_trained
from visattn.watch import Watched, Watcher

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
        self._watchers: tuple[list[Watcher], list[Watcher]] = [], []

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
        self._shared = parallel, mesh
        self.pattern = self.config.pattern_at(0.0)
        self.handle = self._patched()
        if parallel:
            apply(self.teacher, "dense", parallel=parallel, mesh=mesh)
        self.own = self.handle.parameters
        return self.handle

    def _patched(self) -> Handle:
        config, (parallel, mesh) = self.config, self._shared
        return apply(
            self.student,
            self.pattern,
            layers=config.layers,
            dense_layers=config.dense_layers,
            backend=config.backend,
            strict=True,
            untrained=True,
            precision=getattr(config, "quantize", None) or None,
            parallel=parallel,
            mesh=mesh,
        )

    def reach(self, done: float) -> bool:
        """Makes the student what it is when a share of the run is over; returns whether a new stage begins."""
        text = self.config.pattern_at(done)
        if text != self.pattern:
            self.pattern = text
            self.handle.remove()
            self.handle = self._patched()
            # The optimizer, and who wraps this module, have the parameters that there are.
            for site in self.handle.parameters:
                for name in self.handle.parameters[site]:
                    self.handle.parameters[site][name] = self.own[site][name]
            self.own = self.handle.parameters
            ours = self._watchers[1]
            self.handle.watch((lambda watched: _tell(ours, watched)) if ours else None)
        return False

    @property
    def phase(self) -> Any:
        """What a forward depends on beside its batch: where it is equal, forwards do the same."""
        return self.pattern

    def stage_share(self, done: float) -> float:
        """Share of its stage that is over when one of the run is: the learning rate of each falls by itself."""
        return done

    def watch(self, watchers: tuple[Watcher, Watcher], sites: list[str]) -> None:
        """Shows calls of the teacher (dense by visattn from now on) and of the student to one more watcher of each."""
        ours, theirs = reversed(self._watchers)
        if not theirs:
            # Not "dense", and with a backend: a timm model would run its own attention, which cannot be watched.
            handle = apply(self.teacher, dict.fromkeys(sites, "na(window=-1)"), backend="sdpa", strict=True)
            handle.watch(lambda watched: _tell(theirs, watched))
        for known, watcher in zip(self._watchers, watchers, strict=True):
            known.append(watcher)
        self.handle.watch(lambda watched: _tell(ours, watched))

    def watch_rows(self, sites: list[str]) -> None:
        """Lets attention rows be kept, of the teacher and of the student."""
        self.watch((self._rows[0], self._rows[1]), sites)

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


def _tell(watchers: list[Watcher], watched: Watched) -> None:
    for watcher in watchers:
        watcher(watched)


def round_frozen(model: nn.Module) -> None:
    """Keeps what never learns of linear layers, convolutions and norms by root mean squares in bfloat16.

    Autocast rounds weights and biases of the first two in each call: a forward gives the same bits by fewer roundings.
    The norms, of queries and keys, are one kernel where their weights have the dtype of what they get, and some seven
    kernels in float32 otherwise.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | nn.RMSNorm):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


def add_lora(model: nn.Module, paths: list[str], config: RunConfig) -> list[str]:
    """Puts LoRA on the linear layers at some paths; returns the paths."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        alpha = config.lora_alpha or config.lora
        lora = LoraConfig(r=config.lora, lora_alpha=alpha, target_modules=paths)  # type: ignore[arg-type]
        inject_adapter_in_model(lora, model, adapter_name=LORA)
    return paths


def write_start(learning: Mapping[str, nn.Parameter], path: Path) -> None:
    """Gives what learns the values that an earlier student's file holds; what is not in there stays as it is.

    Raises:
        ValueError: If the file holds something that does not learn here, or has another shape.
    """
    trained = load_trained(path)
    held = {f"student.{name}": value for name, value in trained.model.items()}
    held |= {f"own.{name}": value for name, value in trained.own.items()}
    for name, factors in trained.lora.items():
        held |= {f"student.{name}.lora_{each}.{LORA}.weight": x for each, x in zip("AB", factors, strict=True)}
    for name, value in held.items():
        own = learning.get(name)
        if own is None or own.shape != value.shape:
            has = "which does not learn here" if own is None else f"which is {list(own.shape)} here"
            raise ValueError(
                f"--weights {path} (of {trained.about.get('pattern')}) holds {name} {list(value.shape)}, {has}: train "
                "the same projections, by a pattern of the same kind, as that student's run"
            )
    with torch.no_grad():
        for name, value in held.items():
            learning[name].copy_(like(value, learning[name]))


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
        "pattern": config.pattern_ends[1],
        "layers": config.layers,
        "dense_layers": config.dense_layers,
        "heads": config.heads,
        "precision": getattr(config, "quantize", ""),
        "steps": step,
        "lora_scale": config.lora_scale,
    }
    return Trained(whole, lora, own, about)
