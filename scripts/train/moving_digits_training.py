"""Parts of the moving-digits training: settings, the model, its schedule and its export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn

from scripts.train import digits_training
from scripts.train.digits_training import CLASSES
from scripts.train.runs import save_pipeline
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline

FRAMES, SIZE, PATCH = 16, 32, 2
CLASS_TOKENS = 4
# Shift of the noise towards its beginning: a video shows each digit pixel many times over, which hides noise.
TIME_SHIFT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(digits_training.Config):
    """Settings of one training run; fields and checks as in `digits_training.Config`.

    The coarse stage shows clips of 4, then 8 frames, the finishing stage 16. `batch` counts videos of 8 frames in a
    step; a step has the same number of tokens at every length.

    Attributes:
        pattern: Patterns that the finishing steps take turns in, with semicolons between them.
        start: Pipeline folder whose weights the run starts from, or the name of an embedded model; "" for none.
    """

    steps: int = 4000
    finish_steps: int = 3000
    batch: int = 32
    layers: int = 6
    ema: float = 0.999
    pattern: str = "na(window=7x7x7); radial(decay=0.5)"
    coarse_share: float = 0.5
    start: str = ""

    def __post_init__(self) -> None:
        digits_training.Config.__post_init__(self)
        if not self.patterns:
            raise ValueError(f"pattern is {self.pattern!r}: pass one pattern or several with semicolons between them")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the finishing steps."""
        return tuple(text.strip() for text in self.pattern.split(";") if text.strip())

    def finish_pattern(self, step: int) -> str | None:
        """Pattern of a finishing step, None for dense attention; "mixed" has every other step dense."""
        if self.finish_attention != "mixed":
            return digits_training.Config.finish_pattern(self, step)
        return self.patterns[step // 2 % len(self.patterns)] if step % 2 else None


class Progress(digits_training.Progress):
    """Where a run stands."""

    def frames(self, config: Config) -> int:
        """Length of the clips of the next step."""
        if self.finishing:
            return FRAMES
        return FRAMES // 4 if self.coarse(config) < config.tiny_share else FRAMES // 2


def build_model(layers: int = 6) -> WanTransformer3DModel:
    """An untrained model that starts as DiT does: blocks are the identity and the output is zero."""
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        text_dim=(CLASSES + 1) * CLASS_TOKENS,
        freq_dim=64,
        ffn_dim=256,
        num_layers=layers,
        rope_max_seq_len=256,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks: Any = model.blocks
    for linear in (model.condition_embedder.time_proj, model.proj_out, *(block.attn2.to_out[0] for block in blocks)):
        nn.init.zeros_(linear.weight)
    for table in (model.scale_shift_table, *(block.scale_shift_table for block in blocks)):
        nn.init.zeros_(table)
    return model.eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Scheduler with the noise shift of the training."""
    return FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT)


def build_pipeline(model: WanTransformer3DModel) -> PixelWanPipeline:
    """The pipeline around a model."""
    return PixelWanPipeline(model, build_scheduler(), CLASS_TOKENS, FRAMES, SIZE)


def export(model: nn.Module, folder: Path, layers: int) -> int:
    """Writes the model as a float16 pipeline in diffusers' folder format; returns its size in bytes."""
    half: Any = build_model(layers)
    half.load_state_dict(model.state_dict())
    return save_pipeline(build_pipeline(half.to(torch.float16)), folder)
