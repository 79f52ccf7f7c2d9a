"""A small ViT that reads digits: the model, its data and its weights.

scikit-learn's digits as pictures of 64 x 64 pixels, so 16 x 16 patches of 4 pixels. The last 597 digits of the file
are held out. The file has no writers in it, but neighbours in it look like one hand's, so that the held-out digits
are written by others than most of those that the model sees.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from scripts.train.digits_data import jitter, real_digits, upscale
from scripts.train.runs import load_run, part, read_run, save_run

SIZE, PATCH, CLASSES = 64, 4, 10
TRAINING_DIGITS = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of a training run.

    Attributes:
        coarse_steps: Steps at 32 pixels (64 tokens), where one costs a quarter.
        fine_steps: Steps at 64 pixels (256 tokens).
        batch: Digits in a step.
        lr: Highest learning rate; a warm-up of 50 steps, then a cosine down to zero.
        augment: Strength of `digits_data.jitter`.
        seed: Of the first weights and of the batches.
    """

    coarse_steps: int = 1000
    fine_steps: int = 200
    batch: int = 32
    lr: float = 1e-3
    augment: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("coarse_steps", "fine_steps", "augment"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 0 or more")
        for name in ("batch", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number above 0")

    @property
    def steps(self) -> int:
        """Steps of both stages."""
        return self.coarse_steps + self.fine_steps

    def size(self, step: int) -> int:
        """Side of the pictures of a step in pixels."""
        return SIZE // 2 if step < self.coarse_steps else SIZE


def build_vit() -> VisionTransformer:
    """The model with random weights: 6 layers of 4 heads x 32, a class token, 1.2 M parameters."""
    return VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=128,
        depth=6,
        num_heads=4,
        dynamic_img_size=True,
    ).eval()


def split(seen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits [B, 1, 8, 8] with values 0 to 1 and their labels [B]: those to train on, or the held-out ones."""
    images, labels = real_digits()
    part = slice(0, TRAINING_DIGITS) if seen else slice(TRAINING_DIGITS, None)
    return images[part], labels[part]


class Batches:
    """Draws training batches; a batch depends only on the seed and the step.

    Args:
        config: Settings.
    """

    def __init__(self, config: Config) -> None:
        self.images, self.labels = split(seen=True)
        self.config = config

    def draw(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Moved digits [batch, 1, size, size] with values -1 to 1, and their labels [batch]."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        index = torch.randint(len(self.labels), (self.config.batch,), generator=generator)
        theta = jitter(len(index), self.config.augment, generator)
        return upscale(self.images[index], size, theta), self.labels[index]


def learning_rate(highest: float, step: int, steps: int, warmup: int = 50) -> float:
    """A straight warm-up, then a cosine that ends at zero after `steps` steps."""
    return highest * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; the learning rate is set at every step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, lr: float
) -> float:
    """One step of the classifier; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def held_out_accuracy(model: nn.Module, size: int = SIZE, batch: int = 64) -> float:
    """Share of the held-out digits that the model reads right."""
    images, labels = split(seen=False)
    model.eval()
    device = next(model.parameters()).device
    read = torch.cat([model(upscale(some, size).to(device)).argmax(1).cpu() for some in images.split(batch)])
    return (read == labels).float().mean().item()


def save_state(path: Path, config: Config, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes everything that a resumed run needs, see `save_run`."""
    save_run(path, config, {"step": str(step)}, {"model": model}, optimizer)


def load_state(path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_state` wrote; returns the steps that are done.

    Raises:
        ValueError: If the run was started with other settings.
    """
    return int(load_run(path, config, {"model": model}, optimizer)["step"])


def load_vit(path: Path) -> VisionTransformer:
    """The trained model from a checkpoint of the training.

    Raises:
        ValueError: If the file does not exist, or its training is not over.
    """
    metadata, tensors = read_run(path, "run scripts/train/digits_vit.py first", "model")
    steps = Config(**json.loads(metadata["config"])).steps
    if int(metadata["step"]) < steps:
        raise ValueError(f"{path} has {metadata['step']} of {steps} steps: run scripts/train/digits_vit.py to its end")
    model = build_vit()
    model.load_state_dict(part(tensors, "model"))
    return model
