"""The distillation of a timm model: its student, its losses, and what a step learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from scripts.distill.learner import Learner, add_lora
from scripts.distill.loop import Run, begin
from scripts.distill.losses import Recorder, attention_distance
from scripts.distill.optimizers import micro_batches
from scripts.distill.vit_config import DIGITS, VitConfig
from scripts.distill.vit_data import generator_of, open_pictures
from scripts.train.digits_vit_model import load_vit
from visattn.patterns import Dense


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
        images: [B, C, H, W].
        places: Queries whose attention rows are matched, as shares of the tokens [R].
    """

    images: torch.Tensor
    places: torch.Tensor


class VitLearner(Learner):
    """A timm model and its student.

    Args:
        teacher: The model, on the device.
        config: Settings.

    Raises:
        ValueError: If the pattern or the layers do not fit the model.
    """

    config: VitConfig

    def __init__(self, teacher: nn.Module, config: VitConfig) -> None:
        super().__init__(teacher, config)
        found = self.swap().report().sites
        self.sites = {s.site: self.student.get_submodule(s.site) for s in found if not isinstance(s.pattern, Dense)}
        self.lora: list[str] = []
        if config.lora:
            self.lora = add_lora(self.student, linear_layers(self.sites), config)
        elif config.train == "all":
            self.student.requires_grad_(True)
        elif config.train == "attention":
            for module in self.sites.values():
                module.requires_grad_(True)
        self._seen = [
            Recorder({path: model.get_submodule(path) for path in self.sites}, before=False)
            for model in (self.teacher, self.student)
        ]
        if config.maps:
            self.watch_rows(list(self.sites))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch, without their weights; those of weight 0 are left out."""
        config, losses = self.config, {}
        tokens, logits, attended = self._read(self.student, 1, batch)
        with torch.no_grad():
            true_tokens, true_logits, expected = self._read(self.teacher, 0, batch)
        if config.logits:
            losses["logits"] = logit_distance(logits, true_logits, config.temperature)
        if config.features:
            losses["features"] = attention_distance({"": tokens}, {"": true_tokens}, relative=True)
        if config.attention:
            losses["attention"] = attention_distance(attended, expected, relative=True)
        if config.maps:
            losses["maps"] = self.row_distance()
        return losses

    def _read(self, model: Any, which: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Last tokens, logits and attention outputs of one of the two."""
        recorder = self._seen[which]
        with recorder, self._rows[which].of(batch.places):
            tokens = model.forward_features(batch.images)
            logits = model.forward_head(tokens)
        return tokens, logits, recorder.kept


def linear_layers(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the linear layers inside some modules."""
    return [
        f"{path}.{name}" if name else path
        for path, module in modules.items()
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    ]


def logit_distance(logits: torch.Tensor, truth: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of class probabilities from the teacher's, times the squared temperature.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.

    Args:
        logits: The student's [B, classes].
        truth: The teacher's.
        temperature: Divides both.
    """
    ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (logits, truth))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def load_teacher(config: VitConfig) -> nn.Module:
    """The model that `--model` and `--checkpoint` name.

    Raises:
        ValueError: If its weights cannot be had, or do not fit.
    """
    if config.model == DIGITS:
        assert config.checkpoint is not None
        return load_vit(config.checkpoint)
    import timm

    options: dict[str, Any] = {"img_size": config.size} if config.size else {}
    if config.checkpoint is not None:
        options["checkpoint_path"] = str(config.checkpoint)
    try:
        return timm.create_model(config.model, pretrained=config.checkpoint is None, **options).eval()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"cannot make --model {config.model} ({reason}): pass its weights with --checkpoint"
        ) from error


class VitTraining(Run):
    """One run on pictures.

    Args:
        config: Settings, checked.

    Raises:
        ValueError: If teacher and settings do not fit together.
    """

    def __init__(self, config: VitConfig) -> None:
        accelerator = begin(config)
        parts = micro_batches(config, accelerator.process_index, accelerator.num_processes)
        teacher = load_teacher(config).to(accelerator.device)
        self.settings, self.pictures = config, open_pictures(config, teacher)
        super().__init__(config, accelerator, VitLearner(teacher, config), parts)

    def draw(self, part: slice) -> Batch:
        """See `Run.draw`."""
        device, settings = self.accelerator.device, self.settings
        places = torch.rand(settings.map_rows, generator=generator_of(settings.seed + 1, self.step))
        return Batch(self.pictures.draw(self.step, part).to(device), places.to(device))
