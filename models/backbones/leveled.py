"""Pyramids whose stages are `Levels` behind one stem: what NAT, DiNAT_s, Agent-Swin and MAViT share."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.pyramid import Pyramid
from visattn.models.backbones.stages import Levels


class LeveledPyramid(Pyramid):
    """A pyramid of a stem `patch_embed` and `Levels` under the name `layers`.

    A subclass whose official name of the stages is another sets `stages_name` and repeats `forward_stages` with it,
    because TorchScript knows no getattr of computed names.

    Attributes:
        stages_name: Official name of the stages.
        last_names: Regular expression of what follows the last stage, before the head.
    """

    stages_name = "layers"
    last_names = "norm"
    if TYPE_CHECKING:  # TorchScript would take them for attributes that are no modules
        patch_embed: nn.Module
        layers: Levels

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        return self.layers(self.patch_embed(x), take)

    def keep_stages(self, count: int) -> None:
        """See `Pyramid.keep_stages`."""
        setattr(self, self.stages_name, getattr(self, self.stages_name).first(count))

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        stage = rf"^{self.stages_name}\.(\d+)"
        fine = [
            (rf"{stage}\.downsample", (0,)),
            (rf"{stage}\.blocks\.(\d+)", None),
            (rf"^(?:{self.last_names})", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": stage if coarse else fine}
