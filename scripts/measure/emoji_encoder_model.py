"""The dual encoder that names emoji: vectors of pictures and captions, which are alike where they belong together.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", at emoji's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from scripts.train.emoji_captions import TOKENS, VOCABULARY, digest, shipped_tokenizer
from visattn.files import opened, written_whole

# The judge that the project measures with.
ENCODER = Path(__file__).with_name("emoji-encoder.safetensors")
SIDE = 128  # pixels that the encoder looks at
STEM = 64
STAGES = ((64, 2), (128, 2), (192, 1))  # channels and blocks
TEXT = 128
LAYERS = 2
WIDTH = 128
GROUPS = 8
PAD = 0
HOTTEST = 100.0


class Residual(nn.Module):
    """Two 3x3 convolutions, normalised first, around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        second = nn.GroupNorm(GROUPS, channels)
        # Blocks start as the identity.
        nn.init.zeros_(second.weight)
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            second,
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to the same."""
        return x + self.body(x)


class PictureEncoder(nn.Module):
    """A residual network whose last features are averaged over the picture."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, STEM, 8, 4, 2)]
        before = STEM
        for channels, blocks in STAGES:
            if channels != before:
                layers += [nn.GroupNorm(GROUPS, before), nn.Conv2d(before, channels, 3, 2, 1)]
            layers += [Residual(channels) for _ in range(blocks)]
            before = channels
        self.body = nn.Sequential(*layers, nn.GroupNorm(GROUPS, before), nn.GELU())
        self.out = nn.Sequential(nn.Linear(before, 2 * before), nn.GELU(), nn.Linear(2 * before, WIDTH))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Vectors [B, WIDTH] of pictures [B, 3, H, W] with values 0 to 1, of any size."""
        found = self.body(to_side(pictures) * 2 - 1)
        return self.out(found.mean((2, 3)))


class CaptionEncoder(nn.Module):
    """A small transformer over the tokens of the emoji model's tokenizer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, TEXT)
        self.places = nn.Parameter(torch.randn(TOKENS, TEXT) * 0.02)
        layer = nn.TransformerEncoderLayer(
            TEXT, 4, 4 * TEXT, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(TEXT), enable_nested_tensor=False)
        self.out = nn.Linear(TEXT, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [B, WIDTH] of token ids [B, TOKENS]."""
        mask = ids != PAD
        found = self.body(self.tokens(ids) + self.places, src_key_padding_mask=~mask)
        mean = (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.out(mean)


class DualEncoder(nn.Module):
    """Picture and caption encoder, and how sharply their vectors are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = PictureEncoder()
        self.caption = CaptionEncoder()
        self.heat = nn.Parameter(torch.tensor(2.5))

    def logits(self, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Cosines [pictures, captions], sharpened."""
        found, said = self.picture(pictures), self.caption(ids)
        # Sharpened cosines in bfloat16 would be off by whole units.
        with torch.autocast(found.device.type, enabled=False):
            cosines = F.normalize(found.float(), dim=1) @ F.normalize(said.float(), dim=1).T
            return cosines * self.heat.exp().clamp(max=HOTTEST)

    @torch.no_grad()
    def features(self, pictures: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        """Vectors [B, WIDTH] of length 1, float64 on the CPU, for distances between sets of pictures."""
        place = self.heat.device
        parts = [self.picture(part.to(place).float()).float() for part in pictures.split(chunk)]
        return F.normalize(torch.cat(parts), dim=1).double().cpu()

    @torch.no_grad()
    def ranks(self, pictures: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Place [B] of picture i's own caption i among all B captions, 0 for the best."""
        return self.ranks_of(self.features(pictures), ids)

    @torch.no_grad()
    def ranks_of(self, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The same of vectors [B, WIDTH] that `features` gave, or of means of some."""
        said = F.normalize(self.caption(ids.to(self.heat.device)).float(), dim=1).double().cpu()
        found = vectors @ said.T
        return (found > found.diagonal()[:, None]).sum(1)


def to_side(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, H, W] at SIDE x SIDE: averaged down, interpolated up."""
    if pictures.shape[-2:] == (SIDE, SIDE):
        return pictures
    if min(pictures.shape[-2:]) >= SIDE:
        return F.interpolate(pictures, (SIDE, SIDE), mode="area")
    return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", align_corners=False)


def save_encoder(encoder: DualEncoder, path: Path, about: Mapping[str, Any]) -> int:
    """Writes it whole or not at all, in float16; returns its size in bytes."""
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in encoder.state_dict().items()
    }
    if not all(value.isfinite().all() for value in tensors.values()):
        raise ValueError("the encoder's weights are not finite: train it with a smaller --lr")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(dict(about))})
    return path.stat().st_size


def load_encoder(path: Path, device: str | torch.device = "cpu") -> tuple[DualEncoder, dict[str, Any]]:
    """The encoder in float32, and what was written about it.

    Raises:
        ValueError: If the file is missing or something else.
    """
    again = f"run python -m scripts.measure.emoji_encoder --out {path}"
    encoder = DualEncoder()
    with opened(path, "emoji encoder", again) as file:
        about = (file.metadata() or {}).get("about")
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is no emoji encoder ({str(error).splitlines()[0]}): {again}") from error
    if about is None:
        raise ValueError(f"{path} was not written by scripts.measure.emoji_encoder: it says nothing about itself")
    return encoder.to(device).eval().requires_grad_(False), json.loads(about)


def check_tokens(about: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if an encoder would misread the captions of a pack, of which it only sees the tokens.

    Args:
        about: What is written about the encoder.
        tokenizer: The pack's.
    """
    # Encoders that do not say read the tokenizer that ships.
    expected, found = about.get("tokenizer", digest(shipped_tokenizer())), digest(tokenizer)
    if found != expected:
        raise ValueError(
            f"the pack's tokenizer ({found}) is not the encoder's ({expected}): pack again by "
            "python -m scripts.train.emoji_data, or pass the --encoder that was trained on this pack"
        )
