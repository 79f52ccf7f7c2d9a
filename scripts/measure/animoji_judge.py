"""What the judge says about clips: named right, near to real ones in their frames and their motion, flicker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scripts.measure.emoji_encoder_model import DualEncoder
from scripts.measure.emoji_judge import AXES, Judge
from scripts.measure.emoji_prompts import choose
from scripts.measure.estimates import frechet, main_axes
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import Pack
from visattn.pipelines.report.lpips import find_lpips

CHUNK = 64  # clips
FOR_REFERENCE = 400  # real clips that others are compared with


@dataclass(frozen=True, eq=False)
class ClipJudge(Judge):
    """A judge of clips [N, T, 3, H, W].

    Its axes, and its reference, are those of the frames of real clips of the training split other than the measured, of
    emoji without a skin tone, as the measured ones are.

    Attributes:
        motion_axes: [WIDTH, AXES], in which pictures of the differences between real frames vary most.
        motion: Features of these pictures, [N, AXES].
    """

    motion_axes: torch.Tensor
    motion: torch.Tensor

    @classmethod
    def of(cls, encoder: DualEncoder, pack: Pack, captions: int) -> ClipJudge:
        """The judge of some captions of each kind."""
        chosen = choose(pack, captions)
        measured = {i for some in chosen.values() for i in some}
        # As they come, moving or not: as many of the measured ones stand still.
        others = [
            i for i in pack.of(TRAIN).tolist() if i not in measured and pack.pictures[i].code == pack.pictures[i].base
        ]
        clips = _real(pack, others[:: max(1, len(others) // FOR_REFERENCE)])
        if len(clips) < 2:
            raise ValueError(f"{captions} captions leave {len(clips)} real clips to compare with: pass fewer")
        frames, changes = _features(encoder, clips), _features(encoder, differences(clips))
        count = min(AXES, captions - 1)
        (axes, kept), (motion_axes, _) = (main_axes(each.flatten(0, 1).numpy(), count) for each in (frames, changes))
        plane, motion = torch.from_numpy(axes.copy()), torch.from_numpy(motion_axes.copy())
        reference = frames.flatten(0, 1) @ plane
        lpips, note = find_lpips()
        moved = changes.flatten(0, 1) @ motion
        return cls(encoder, pack, chosen, plane, kept, reference, lpips, note, motion, moved)

    def named(self, pictures: torch.Tensor, kind: str) -> dict[str, Any]:
        """Figures of clips, values 0 to 1, of the captions of a kind.

        A clip is named by the mean of its frames' vectors. `frechet` is that of frames, `frechet_motion` that of
        pictures of the differences between successive frames; `movement` and `flicker`: see there.
        """
        frames, changes = (_features(self.encoder, each) for each in (pictures, differences(pictures)))
        found = self.shares(
            self.encoder.ranks_of(frames.mean(1), self.pack.plain[torch.tensor(self.chosen[kind])]), kind
        )
        pairs = ((frames @ self.axes, self.reference), (changes @ self.motion_axes, self.motion))
        near = [frechet(ours.flatten(0, 1).numpy(), real.numpy()) for ours, real in pairs]
        found |= {"frechet": round(near[0], 5), "frechet_motion": round(near[1], 5)}
        return found | {"movement": round(movement(pictures), 5), "flicker": round(flicker(pictures), 5)}

    def real(self, kind: str) -> dict[str, Any]:
        """The same figures of the real clips of these captions: what a perfect model would reach."""
        return self.named(_real(self.pack, self.chosen[kind]), kind)

    def likeness(self, pictures: torch.Tensor, twins: torch.Tensor) -> dict[str, Any]:
        """Mean PSNR, SSIM and LPIPS of the frames to those of the dense model of the same noise."""
        return super().likeness(pictures.flatten(0, 1), twins.flatten(0, 1))


def differences(clips: torch.Tensor) -> torch.Tensor:
    """Pictures [N, T - 1, 3, H, W] of what changes from frame to frame: grey where nothing does."""
    return 0.5 + (clips[:, 1:] - clips[:, :-1]) / 2


def movement(clips: torch.Tensor) -> float:
    """Mean change of a value from a frame to the next."""
    return (clips[:, 1:] - clips[:, :-1]).abs().mean().item()


def flicker(clips: torch.Tensor) -> float:
    """Mean distance of a value from the middle between those of the frames before and after.

    A value that changes steadily has none; one that goes up and down from frame to frame has as much as it moves.
    """
    return (clips[:, 1:-1] - (clips[:, 2:] + clips[:, :-2]) / 2).abs().mean().item()


def _real(pack: Pack, indices: list[int]) -> torch.Tensor:
    return pack.pixels[torch.tensor(indices, dtype=torch.long)].cpu().float() / 255


def _features(encoder: DualEncoder, clips: torch.Tensor) -> torch.Tensor:
    """[N, T, WIDTH] of each frame."""
    parts = [encoder.features(part.flatten(0, 1)).unflatten(0, (-1, part.shape[1])) for part in clips.split(CHUNK)]
    return torch.cat(parts)
