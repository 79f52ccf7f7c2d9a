"""Random-weight block stacks of the size of FLUX and of Wan 1.3B in plain torch, with any attention inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention, silu

# q, k, v [B, S, H, D] to the output [B, S, H, D].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Torch's own attention."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x [B, S, H, D] whose neighbouring channels are pairs, with `turns`.

    No pair is taken apart and stacked again, which inductor writes to memory in float32.
    """
    other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * turn[0] + other.float() * turn[1]).to(x.dtype)


def turns(length: int, dim: int, device: torch.device | str) -> torch.Tensor:
    """Factors of a channel and of the other one of its pair [2, S, 1, D]; positions are 1-D, which changes no time."""
    at = torch.arange(length, device=device)[:, None]
    angle = at * 10000 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    cosines, sines = angle.cos(), angle.sin()
    own, other = torch.stack([cosines, cosines], -1), torch.stack([-sines, sines], -1)
    return torch.stack([own.flatten(-2), other.flatten(-2)])[:, :, None]


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, shifted and scaled per sample."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """The weights of one stream (image or text) of a double block."""

    def __init__(self, hidden: int, heads: int, ratio: int) -> None:
        """Sizes as in `Flux`."""
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norms = nn.Parameter(torch.ones(2, hidden // heads))
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ratio * hidden), nn.Linear(ratio * hidden, hidden)

    def project(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, turn: torch.Tensor
    ) -> list[torch.Tensor]:
        """q, k, v [B, S, H, D] with the positions `turn` of these tokens."""
        q, k, v = self.qkv(modulated(x, shift, scale)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rms_norm(q, q.shape[-1:], self.norms[0]), rms_norm(k, k.shape[-1:], self.norms[1])
        return [rotated(q, turn), rotated(k, turn), v]

    def finish(self, x: torch.Tensor, attended: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Residuals of attention and MLP."""
        gate, shift, scale, last = parts
        x = x + gate * self.out(attended.flatten(2))
        return x + last * self.down(gelu(self.up(modulated(x, shift, scale)), approximate="tanh"))


class DoubleBlock(nn.Module):
    """Image and text streams with joint attention (the double block of FLUX)."""

    def __init__(self, hidden: int, heads: int, ratio: int) -> None:
        """Sizes as in `Flux`."""
        super().__init__()
        self.image, self.text = Stream(hidden, heads, ratio), Stream(hidden, heads, ratio)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, vector: torch.Tensor, turn: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams; text comes first in the joint sequence."""
        parts = [stream.modulation(silu(vector))[:, None].chunk(6, -1) for stream in (self.text, self.image)]
        # Positions before the streams are joined, so that what is joined is written once.
        where = turn.split([text.shape[1], x.shape[1]], 1)
        projected = [
            stream.project(tokens, part[0], part[1], at)
            for stream, tokens, part, at in zip((self.text, self.image), (text, x), parts, where, strict=True)
        ]
        q, k, v = (torch.cat(pair, 1) for pair in zip(*projected, strict=True))
        out = attend(q, k, v)
        text_out, image_out = out.split([text.shape[1], x.shape[1]], 1)
        return self.image.finish(x, image_out, parts[1][2:]), self.text.finish(text, text_out, parts[0][2:])


class SingleBlock(nn.Module):
    """Attention and MLP side by side over text and image (the single block of FLUX)."""

    def __init__(self, hidden: int, heads: int, ratio: int) -> None:
        """Sizes as in `Flux`."""
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.modulation = nn.Linear(hidden, 3 * hidden)
        self.first = nn.Linear(hidden, (3 + ratio) * hidden)
        self.norms = nn.Parameter(torch.ones(2, hidden // heads))
        self.last = nn.Linear((1 + ratio) * hidden, hidden)

    def forward(self, x: torch.Tensor, vector: torch.Tensor, turn: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Joint tokens [B, S, C]."""
        shift, scale, gate = self.modulation(silu(vector))[:, None].chunk(3, -1)
        qkv, inner = self.first(modulated(x, shift, scale)).split(
            [3 * self.hidden, self.last.in_features - self.hidden], -1
        )
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rms_norm(q, q.shape[-1:], self.norms[0]), rms_norm(k, k.shape[-1:], self.norms[1])
        out = attend(rotated(q, turn), rotated(k, turn), v)
        return x + gate * self.last(torch.cat([out.flatten(2), gelu(inner, approximate="tanh")], -1))


class Flux(nn.Module):
    """2 double and 4 single blocks: the full model's 19 and 38 in the same proportion."""

    hidden, heads, text, share = 3072, 24, 512, 2 / 19
    patterns: ClassVar[tuple[str, ...]] = ("na(window=40x40,stride=8x8)", "clear(radius=16)")
    grids: ClassVar[tuple[tuple[int, ...], ...]] = ((64, 64), (128, 128), (256, 256))

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.doubles = nn.ModuleList([DoubleBlock(self.hidden, self.heads, 4) for _ in range(2)])
        self.singles = nn.ModuleList([SingleBlock(self.hidden, self.heads, 4) for _ in range(4)])

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, vector: torch.Tensor, turn: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Image tokens [B, S, C]."""
        for block in self.doubles:
            x, text = block(x, text, vector, turn, attend)
        x = torch.cat([text, x], 1)
        for block in self.singles:
            x = block(x, vector, turn, attend)
        return x[:, text.shape[1] :]


class VideoBlock(nn.Module):
    """Self-attention, cross-attention to text, MLP (the block of Wan)."""

    def __init__(self, hidden: int, heads: int, inner: int) -> None:
        """Sizes as in `Wan`."""
        super().__init__()
        self.heads = heads
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden) / hidden**0.5)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.norms = nn.Parameter(torch.ones(4, hidden))
        self.cross_q, self.cross_kv = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * hidden)
        self.cross_out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, vector: torch.Tensor, turn: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Video tokens [B, S, C]."""
        parts = (self.modulation + vector[:, None]).chunk(6, 1)
        q, k, v = self.qkv(modulated(x, parts[0], parts[1])).chunk(3, -1)
        q, k = (rms_norm(t, t.shape[-1:], w) for t, w in ((q, self.norms[0]), (k, self.norms[1])))
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        x = x + parts[2] * self.out(attend(rotated(q, turn), rotated(k, turn), v).flatten(2))
        q = rms_norm(self.cross_q(layer_norm(x, x.shape[-1:])), x.shape[-1:], self.norms[2])
        k, v = self.cross_kv(text).chunk(2, -1)
        k = rms_norm(k, k.shape[-1:], self.norms[3])
        crossed = dense(*(t.unflatten(-1, (self.heads, -1)) for t in (q, k, v)))
        x = x + self.cross_out(crossed.flatten(2))
        return x + parts[5] * self.down(gelu(self.up(modulated(x, parts[3], parts[4])), approximate="tanh"))


class Wan(nn.Module):
    """2 of the 30 blocks of Wan 1.3B."""

    hidden, heads, text, share = 1536, 12, 512, 2 / 30
    patterns: ClassVar[tuple[str, ...]] = ("radial(decay=0.2)", "topk(keep=0.1, block=1x8x16, key_block=1x8x8)")
    grids: ClassVar[tuple[tuple[int, ...], ...]] = ((21, 45, 80), (21, 90, 160))

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.blocks = nn.ModuleList([VideoBlock(self.hidden, self.heads, 8960) for _ in range(2)])

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, vector: torch.Tensor, turn: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Video tokens [B, S, C]."""
        for block in self.blocks:
            x = block(x, text, vector, turn, attend)
        return x
