"""Pictures of the emoji model's pack beside the clips: more looks of every emoji, as clips that stand still."""

from __future__ import annotations

from dataclasses import replace

import torch

from scripts.train.animoji_captions import MOVING, STILL, STYLE
from scripts.train.animoji_sources import FRAMES
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import Pack

# Part of the samples that are pictures: of single frames, and of clips, where they teach what a name looks like.
SHARE_OF_FRAMES, SHARE_OF_CLIPS = 0.6, 0.15


def with_pictures(clips: Pack, pictures: Pack) -> Pack:
    """Clips, and behind them pictures of the same side as clips that stand still.

    Raises:
        ValueError: If the packs were made with different tokenizers.
    """
    if clips.tokenizer.get_vocab() != pictures.tokenizer.get_vocab():
        raise ValueError("the pictures' tokenizer is not that of the clips: pack both from the same sources")
    still = pictures.pixels[:, None].expand(-1, FRAMES, -1, -1, -1)
    return replace(
        clips,
        pictures=(*clips.pictures, *pictures.pictures),
        pixels=torch.cat([clips.pixels, still]),
        tokens=torch.cat([clips.tokens, pictures.tokens]),
        plain=torch.cat([clips.plain, pictures.plain]),
    )


def clip_weights(pack: Pack, split: str) -> torch.Tensor:
    """[N] of the clips of a split, on the CPU; pictures have none."""
    clips = torch.tensor([each.style in (MOVING, STILL) for each in pack.pictures])
    return pack.weights(split) * clips


def stage_weights(pack: Pack, frames: int) -> torch.Tensor:
    """[N] of what is trained on with a number of frames, on the CPU.

    Pictures in the clips' own style are for single frames only: their captions are those of clips that move.
    """
    clips = clip_weights(pack, TRAIN)
    pictures = pack.weights(TRAIN) * (clips == 0)
    if frames > 1:
        pictures *= torch.tensor([each.style != STYLE for each in pack.pictures])
    if not pictures.any():
        return clips
    share = SHARE_OF_FRAMES if frames == 1 else SHARE_OF_CLIPS
    return clips * ((1 - share) / clips.sum()) + pictures * (share / pictures.sum())
