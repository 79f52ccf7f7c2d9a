"""Parts of the animoji training: settings, batches and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from scripts.train.animoji_model import AnimojiModel
from scripts.train.animoji_sources import FRAMES
from scripts.train.emoji_data import Pack
from scripts.train.emoji_model import time_shift
from scripts.train.flow import Batch, FlowConfig, draw_batch, own_fields
from visattn.pipelines.embedded.pixel_wan_text import predict_clean
from visattn.pipelines.embedded.prompts import encode_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(FlowConfig):
    """Settings of one training.

    Attributes:
        lengths: Frames of the clips of each stage: one and a few teach looks and captions at a fraction of the cost.
        heads: Heads of 64 of the transformer.
        layers: Its blocks.
        ffn: Width of their feed-forward layers.
    """

    LARGEST: ClassVar[int] = 64

    budget: float = 600.0
    sides: tuple[int, ...] = (64, 64, 64)
    shares: tuple[float, ...] = (0.35, 0.55, 1.0)
    mixed: float = 0.25
    tokens: int = 200_000
    ema: float = 0.995
    lengths: tuple[int, ...] = (1, 4, 16)
    heads: int = 4
    layers: int = 7
    ffn: int = 1024

    def __post_init__(self) -> None:
        FlowConfig.__post_init__(self)
        if len(self.lengths) != len(self.sides):
            raise ValueError(f"lengths {self.lengths} and sides {self.sides} must be as many")
        for length in self.lengths:
            if not 1 <= length <= FRAMES:
                raise ValueError(f"length {length} is no number of frames of a clip: pass 1 to {FRAMES}")

    @classmethod
    def shape(cls) -> tuple[str, ...]:
        """See `FlowConfig.shape`."""
        return tuple(name for name in own_fields(cls) if name != "lengths")

    def tokens_of(self, stage: int) -> int:
        """Tokens of a clip."""
        return self.lengths[stage] * (self.sides[stage] // self.PATCH) ** 2

    def size(self, stage: int) -> dict[str, int]:
        """See `FlowConfig.size`."""
        return {"frames": self.lengths[stage], "side": self.sides[stage]}

    def model(self) -> AnimojiModel:
        """An untrained model."""
        torch.manual_seed(self.seed)
        return AnimojiModel(self.heads, self.layers, self.ffn)


def draw(pack: Pack, weights: torch.Tensor, stage: int, count: int, config: Config, seed: int) -> Batch:
    """A batch of clips of a stage that depends on the seed alone, see `draw_batch`."""
    frames, side = config.lengths[stage], config.sides[stage]

    def view(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return to_clips(pixels, frames, side, generator)

    return draw_batch(pack, weights, view, count, config, time_shift(config.tokens_of(stage)), seed)


def to_clips(pixels: torch.Tensor, frames: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Successive frames from a random one on, as [B, 3, frames, side, side] float32 from -1 to 1.

    Args:
        pixels: uint8 clips [B, FRAMES, 3, H, W].
        frames: How many.
        side: Of the frames, a part of H = W.
        generator: Says which.
    """
    batch, count, _, height, _ = pixels.shape
    start = torch.randint(count - frames + 1, (batch, 1), generator=generator, device=pixels.device)
    index = start + torch.arange(frames, device=pixels.device)
    picked = pixels[torch.arange(batch, device=pixels.device)[:, None], index].transpose(1, 2).float()
    factor = height // side
    return torch.nn.functional.avg_pool3d(picked, (1, factor, factor)) / 127.5 - 1


def loss_of(model: AnimojiModel, batch: Batch) -> torch.Tensor:
    """Mean square error [B] of the velocity that the predicted clean clip implies."""
    encoder: Any = model.text_encoder
    text = encode_tokens(encoder, batch.ids, encoder.config.pad_token_id).text
    return batch.error(predict_clean(model.transformer, batch.noisy(), batch.sigma, text))
