"""Pyramids whose stages have numbered official names: what Agent-PVT and MoH-ViT share."""

from typing import Any

import torch

from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.pyramid import Pyramid


class NumberedPyramid(Pyramid):
    """A pyramid of four stages whose parts are `patch_embed1`, `block1` and so on.

    A subclass implements `stage1` to `stage4`, map to map, [B, H, W, C]: the official names are not a list, and
    TorchScript knows no getattr of computed names.

    Attributes:
        parts: Names of a stage's parts without their number, `block` and what is before and after it.
    """

    parts: tuple[str, ...] = ()

    def stage1(self, x: torch.Tensor) -> torch.Tensor:
        """The first stage of an image [B, H, W, C]."""
        raise NotImplementedError

    def stage2(self, x: torch.Tensor) -> torch.Tensor:
        """The second stage."""
        raise NotImplementedError

    def stage3(self, x: torch.Tensor) -> torch.Tensor:
        """The third stage."""
        raise NotImplementedError

    def stage4(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage."""
        raise NotImplementedError

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        maps: list[torch.Tensor] = []
        x = self.stage1(x.permute(0, 2, 3, 1))
        if 0 in take:
            maps.append(x)
        if take[-1] >= 1:
            x = self.stage2(x)
            if 1 in take:
                maps.append(x)
        if take[-1] >= 2:
            x = self.stage3(x)
            if 2 in take:
                maps.append(x)
        if take[-1] >= 3:
            x = self.stage4(x)
            if 3 in take:
                maps.append(x)
        return maps

    def keep_stages(self, count: int) -> None:
        """See `Pyramid.keep_stages`."""
        for i in range(count, 4):
            for part in self.parts:
                delattr(self, f"{part}{i + 1}")

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        embed = r"(?:patch_embed|pos_embed)"
        fine = [(rf"^{embed}(\d+)", (0,)), (r"^block(\d+)\.(\d+)", None), (r"^norm(\d+)", (99999,))]
        whole = r"^(?:block|patch_embed|pos_embed|norm)(\d+)"
        return {"stem": rf"^{embed}1", "blocks": whole if coarse else fine}
