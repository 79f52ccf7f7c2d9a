"""Parts of the emoji training: settings, batches and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from scripts.train.emoji_captions import TOKENS
from scripts.train.emoji_data import Pack
from scripts.train.emoji_model import EmojiModel, time_shift
from scripts.train.emoji_sources import SIDE
from scripts.train.flow import EVEN, Batch, FlowConfig, draw_batch, own_fields
from visattn.pipelines.embedded.pixel_flux import predict_clean
from visattn.pipelines.embedded.prompts import encode_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(FlowConfig):
    """Settings of one training.

    Attributes:
        heads: Heads of 64 of transformer and text encoder.
        double: Double blocks.
        single: Single blocks.
        text: Layers of the text encoder.
    """

    heads: int = 3
    double: int = 3
    single: int = 8
    text: int = 3

    @classmethod
    def shape(cls) -> tuple[str, ...]:
        """See `FlowConfig.shape`."""
        return own_fields(cls)

    def tokens_of(self, stage: int) -> int:
        """Image and text tokens of a picture."""
        return (self.sides[stage] // self.PATCH) ** 2 + TOKENS

    def model(self) -> EmojiModel:
        """An untrained model."""
        torch.manual_seed(self.seed)
        return EmojiModel(self.heads, self.double, self.single, self.text)


def draw(pack: Pack, weights: torch.Tensor, side: int, count: int, config: FlowConfig, seed: int) -> Batch:
    """A batch of pictures of a side that depends on the seed alone, see `draw_batch`."""
    shift = time_shift((side // config.PATCH) ** 2)
    return draw_batch(pack, weights, lambda pixels, _: to_side(pixels, side), count, config, shift, seed)


def to_side(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 pictures [B, 3, SIDE, SIDE] as float32 of a side, from -1 to 1."""
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // side) / 127.5 - 1


def loss_of(model: EmojiModel, batch: Batch) -> torch.Tensor:
    """Mean square error [B] of the velocity that the predicted clean picture implies."""
    condition = encode_tokens(model.text_encoder, batch.ids, 0)
    spacing = SIDE / batch.clean.shape[-1]
    return batch.error(predict_clean(model.transformer, batch.noisy(), batch.sigma, condition, spacing))


@torch.no_grad()
def losses_by_split(model: EmojiModel, pack: Pack, stage: int, config: Config, count: int = 128) -> dict[str, float]:
    """Mean loss on fixed pictures, noise and levels of each split, with captions as in training."""
    found = {}
    chunk = max(EVEN, config.batch(stage) // 2)
    for split in dict.fromkeys(each.split for each in pack.pictures):
        batch = draw(pack, pack.weights(split).to(pack.pixels.device), config.sides[stage], count, config, 12345)
        parts = -(-count // chunk)
        losses = torch.cat([loss_of(model, batch.part(i, parts)) for i in range(parts)])
        found[split] = losses.mean().item()
    return found
