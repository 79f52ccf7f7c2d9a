"""What the judge says about pictures that an emoji model drew: named right, near to real ones, near to a dense twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scripts.measure.emoji_encoder_model import DualEncoder
from scripts.measure.emoji_prompts import UNSEEN, choose
from scripts.measure.estimates import frechet, main_axes, wilson
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN
from scripts.train.emoji_data import Pack
from visattn.metrics import psnr, ssim
from visattn.pipelines.report.lpips import find_lpips

# A full covariance in them is known from a hundred pictures; in all 128 it is not.
AXES = 16
FOR_AXES = 2000  # about so many real pictures say where the axes lie
BEST = 100.0  # dB, of equal pictures
CHUNK = 20
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Judge:
    """The encoder, the captions that are measured, and the real pictures that others are compared with.

    Attributes:
        encoder: Trained on real pictures only.
        pack: The real pictures, on the encoder's device.
        chosen: Indices of the measured pictures by kind, see `choose`.
        axes: [WIDTH, AXES], in which the real pictures of the training split vary most.
        kept: Share of their variance in these.
        reference: Features of the held-out real pictures other than the measured ones, [N, AXES].
        lpips: Distance of pictures, where its weights are there.
        lpips_note: Whether they are.
    """

    encoder: DualEncoder
    pack: Pack
    chosen: Mapping[str, list[int]]
    axes: torch.Tensor
    kept: float
    reference: torch.Tensor
    lpips: Distance | None
    lpips_note: str

    @classmethod
    def of(cls, encoder: DualEncoder, pack: Pack, captions: int) -> Judge:
        """The judge of some captions of each kind."""
        chosen = choose(pack, captions)
        train = pack.of(TRAIN)
        features = encoder.features(pack.pixels[train[:: max(1, len(train) // FOR_AXES)]].float() / 255)
        axes, kept = main_axes(features.numpy(), min(AXES, captions - 1, len(features) - 1))
        held = sorted(set(pack.of(NEW_PAIR, NEW_EMOJI).tolist()) - set(chosen[UNSEEN]))
        if len(held) < 2:
            raise ValueError(f"{captions} captions leave {len(held)} held-out pictures to compare with: pass fewer")
        plane = torch.from_numpy(axes.copy())
        reference = encoder.features(pack.pixels[torch.tensor(held)].float() / 255) @ plane
        lpips, note = find_lpips()
        return cls(encoder, pack, chosen, plane, kept, reference, lpips, note)

    def captions(self, kind: str) -> list[str]:
        """The measured captions of a kind."""
        return [self.pack.pictures[i].caption for i in self.chosen[kind]]

    def named(self, pictures: torch.Tensor, kind: str) -> dict[str, Any]:
        """Figures of pictures [N, 3, H, W], values 0 to 1, of the captions of a kind: shares with 95 % intervals."""
        found = self.shares(self.encoder.ranks(pictures, self.pack.plain[torch.tensor(self.chosen[kind])]), kind)
        features = self.encoder.features(pictures) @ self.axes
        return found | {"frechet": round(frechet(features.numpy(), self.reference.numpy()), 5)}

    def shares(self, ranks: torch.Tensor, kind: str) -> dict[str, Any]:
        """`shares` of the captions of a kind, and of those of each split in it where there are several."""
        splits = [self.pack.pictures[i].split for i in self.chosen[kind]]
        found, names = shares(ranks), sorted(set(splits))
        if len(names) > 1:
            found["splits"] = {name: shares(ranks[torch.tensor([each == name for each in splits])]) for name in names}
        return found

    def real(self, kind: str) -> dict[str, Any]:
        """The same figures of the real pictures of these captions, as they are: what a perfect model would reach."""
        return self.named(self.pack.pixels[torch.tensor(self.chosen[kind])].float() / 255, kind)

    def likeness(self, pictures: torch.Tensor, twins: torch.Tensor) -> dict[str, Any]:
        """Mean PSNR (at most BEST), SSIM and LPIPS to the dense model's pictures of the same noise."""
        found: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
        lpips, place = self.lpips, self.encoder.heat.device
        for a, b in zip(pictures.split(CHUNK), twins.split(CHUNK), strict=True):
            near, far = a.to(place), b.to(place)
            found["psnr"].append(psnr(near, far).clamp(max=BEST).cpu())
            found["ssim"].append(ssim(near, far).cpu())
            if lpips is not None:
                found["lpips"].append(lpips(a, b).double().cpu())
        return {name: round(torch.cat(parts).mean().item(), 4) if parts else None for name, parts in found.items()}


def shares(ranks: torch.Tensor) -> dict[str, Any]:
    """How often the right caption is first, or among the first five, of ranks [N] from 0, with 95 % intervals."""
    found: dict[str, Any] = {"pictures": len(ranks)}
    for name, places in (("top1", 1), ("top5", 5)):
        right = int((ranks < places).sum())
        low, high = wilson(right, len(ranks))
        found[name] = round(right / len(ranks), 4)
        found[f"{name}_interval"] = [round(low, 4), round(high, 4)]
    return found
