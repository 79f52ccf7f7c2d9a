"""Parts of the digits training: the model, where a run stands, its learning rate, checkpoints and export."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import nn

from scripts.train.runs import load_run, part, read_run, save_pipeline, save_run
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline

NULL_LABEL_DROPOUT = 0.1
CLASSES = 10  # and the index of the null class
FULL_SIZE = 64
PATCH = 2
FINISH_ATTENTIONS = ("dense", "mixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one training run; the checks run before any work.

    Attributes:
        steps: Most steps of the coarse stage (16 px, then 32 px); 0 leaves it out.
        finish_steps: Most steps of the finishing stage (64 px).
        minutes: Wall-clock budget; the schedule follows whichever of steps and time is further. 0: steps only.
        batch: Images a step at 32 px; a step has the same number of tokens at every size.
        finish_attention: "dense", a pattern for every finishing step, or "mixed": `pattern` every other step.
        coarse_share: Part of the learning rate schedule, and of `minutes`, that the coarse stage has.
        tiny_share: Part of the coarse stage that runs at 16 px.
    """

    steps: int = 4000
    finish_steps: int = 1200
    minutes: float = 0.0
    batch: int = 32
    lr: float = 1e-3
    ema: float = 0.998
    augment: float = 0.6
    seed: int = 0
    layers: int = 5
    finish_attention: str = "mixed"
    pattern: str = "na(window=9x9)"
    coarse_share: float = 0.6
    tiny_share: float = 0.4

    def __post_init__(self) -> None:
        for name in ("batch", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 1 or more")
        for name in ("steps", "finish_steps", "minutes", "augment"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 0 or more")
        for name in ("coarse_share", "tiny_share", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number from 0 to below 1")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}: pass a number above 0")
        if self.finish_attention not in FINISH_ATTENTIONS and "(" not in self.finish_attention:
            expected = f"{', '.join(FINISH_ATTENTIONS)} or a pattern such as na(window=9x9)"
            raise ValueError(f"finish_attention {self.finish_attention!r} does not exist: pass {expected}")

    def finish_pattern(self, step: int) -> str | None:
        """Pattern of a finishing step, None for dense attention."""
        if self.finish_attention == "mixed":
            return self.pattern if step % 2 else None
        return None if self.finish_attention == "dense" else self.finish_attention


# Settings that a resumed run may change: they move the schedule, not what the weights so far were trained on.
CHANGEABLE = {"steps", "finish_steps", "minutes", "finish_attention", "pattern", "coarse_share", "tiny_share"}


@dataclass(slots=True)
class Progress:
    """Where a run stands: steps done, seconds spent, and both at the start of the finishing stage."""

    step: int = 0
    seconds: float = 0.0
    finish_step: int = -1
    finish_seconds: float = 0.0

    @property
    def finishing(self) -> bool:
        """Whether the finishing stage has begun."""
        return self.finish_step >= 0

    def coarse(self, config: Config) -> float:
        """Part of the coarse stage that is done, 1 and above: over."""
        if config.steps == 0:
            return 1.0
        budget = config.minutes * 60 * config.coarse_share
        return max(self.step / config.steps, self.seconds / budget if budget else 0.0)

    def fine(self, config: Config) -> float:
        """Part of the finishing stage that is done, 1 and above: over."""
        if not self.finishing:
            return 0.0
        if config.finish_steps == 0:
            return 1.0
        budget = config.minutes * 60 - self.finish_seconds
        by_time = (self.seconds - self.finish_seconds) / max(budget, 1e-9) if config.minutes else 0.0
        return max((self.step - self.finish_step) / config.finish_steps, by_time)

    def advance(self, config: Config) -> bool:
        """Enters the finishing stage when its turn comes; returns whether the run is over."""
        if not self.finishing and self.coarse(config) >= 1:
            self.finish_step, self.finish_seconds = self.step, self.seconds
        return self.finishing and self.fine(config) >= 1

    def size(self, config: Config) -> int:
        """Image side of the next step in pixels."""
        if self.finishing:
            return FULL_SIZE
        return FULL_SIZE // 4 if self.coarse(config) < config.tiny_share else FULL_SIZE // 2

    def lr(self, config: Config) -> float:
        """Learning rate: 100 warm-up steps, then a cosine over both stages down to 2 %."""
        share = config.coarse_share if config.steps else 0.0
        done = share + (1 - share) * self.fine(config) if self.finishing else share * self.coarse(config)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0))
        return config.lr * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * cosine)


def build_model(layers: int = 5) -> DiTTransformer2DModel:
    """An untrained model with DiT's own start: blocks are the identity and the output is zero."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=FULL_SIZE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
        norm_type="ada_norm_zero",
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    blocks: Any = model.transformer_blocks
    for linear in (*(block.norm1.linear for block in blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    # Dropping labels is the loop's work: the model's own dropout draws anew in every block.
    return model.eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Scheduler whose shift is 6 at 64 px and follows the side length."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=round(math.log(time_shift(FULL_SIZE)), 4),
        base_image_seq_len=(FULL_SIZE // PATCH) ** 2,
    )


def time_shift(size: int) -> float:
    """Noise shift for a side in pixels; it keeps the noise the same after averaging down to 8x8."""
    return size * 3 / 32


def save_checkpoint(
    path: Path,
    config: Config,
    progress: Progress,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes everything that a resumed run needs, see `save_run`."""
    save_run(path, config, {"progress": json.dumps(asdict(progress))}, {"model": model, "ema": ema}, optimizer)


def load_checkpoint(
    path: Path, config: Config, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Restores what `save_checkpoint` wrote.

    Raises:
        ValueError: If the run was started with other settings than `config`, `CHANGEABLE` ones aside.
    """
    metadata = load_run(path, config, {"model": model, "ema": ema}, optimizer, CHANGEABLE)
    saved = json.loads(metadata["progress"])
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step, from a seed of its own: a resumed run needs no generator state to be exact."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def update(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float) -> float:
    """One step of the optimizer, its gradients clipped and then dropped; returns their norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def export_checkpoint(path: Path, folder: Path) -> int:
    """Exports the averaged weights of a run that may still go on; returns the size in bytes."""
    metadata, tensors = read_run(path, "train first, without --export-only", "ema")
    model = build_model(json.loads(metadata["config"])["layers"])
    model.load_state_dict(part(tensors, "ema"))
    return export(model, folder)


def export(model: DiTTransformer2DModel, folder: Path) -> int:
    """Writes the model as a float16 pipeline in diffusers' folder format; returns its size in bytes."""
    half = build_model(len(model.transformer_blocks))
    half.load_state_dict(model.state_dict())
    return save_pipeline(PixelDiTPipeline(half.half(), build_scheduler()), folder)
