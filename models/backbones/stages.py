"""The stages of a pyramid: blocks that can be recomputed in the backward pass, and steps down between them."""

import torch
from timm.models import checkpoint_seq
from torch import nn


class Blocks(nn.Sequential):
    """The blocks of a stage, recomputed in the backward pass if `grad_checkpointing`."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run every block."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self, x)
        else:
            for block in self:
                x = block(x)
        return x


class Level(nn.Module):
    """A stage: blocks, and the step down to the next stage, which `Levels` takes."""

    def __init__(self, blocks: Blocks, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks."""
        return self.blocks(x)


class Levels(nn.Sequential):
    """Stages that are a `Level` each. A module of its own, so models with different names for it share its loop."""

    def forward(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """Maps of the stages listed in `take` (ascending); later stages do not run."""
        maps: list[torch.Tensor] = []
        for i, level in enumerate(self):
            if i <= take[-1]:
                x = level(x)
                if i in take:
                    maps.append(x)
                if i < take[-1]:
                    x = level.downsample(x)  # type: ignore[operator]
        return maps

    def first(self, count: int) -> "Levels":
        """The first so many stages, without the step down after the last of them."""
        kept = Levels(*(self[i] for i in range(count)))
        kept[-1].downsample = nn.Identity()
        return kept
