"""How good generated digits are: read by a classifier, and as a distribution in a classifier's feature space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from scripts.measure.digits import TRAINING_DIGITS, Reader, train_reader
from scripts.train.digits_data import DigitBatches, real_digits, upscale

SIDE = 32
FEATURES = 64


class FeatureNet(nn.Module):
    """A small convolutional classifier of digits; its penultimate layer is the feature space."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 8) ** 2, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, FEATURES] of images [B, 1, H, W] with values -1 to 1."""
        return self.body(F.interpolate(images, (SIDE, SIDE), mode="area"))


@dataclass(frozen=True, eq=False)
class Judge:
    """Reads digits, and says how far two sets of them are apart.

    Attributes:
        reader: The support vector machine of scripts/measure/digits.py.
        net: The classifier whose features are compared.
        accuracy: The net's, on held-out real digits.
    """

    reader: Reader
    net: FeatureNet
    accuracy: float

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> NDArray[np.float64]:
        """Features [B, FEATURES] of images [B, 1, H, W], values -1 to 1."""
        return torch.cat([self.net(part) for part in images.float().split(256)]).double().numpy()

    def recognized(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of images that are read as what they should be."""
        return (self.reader.read(images) == labels).float().mean().item()


def train_judge(size: int = 64, steps: int = 300, seed: int = 0) -> Judge:
    """Trains both classifiers on 1200 of the 1797 real digits, enlarged like the generator's training pictures."""
    images, labels = real_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:TRAINING_DIGITS], order[TRAINING_DIGITS:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet()
    batches = DigitBatches()
    batches.images, batches.labels = images[seen], labels[seen]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        pictures, truth = batches.draw(128, SIDE, generator)
        F.cross_entropy(net.head(net(pictures)), truth).backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        guess = net(upscale(images[unseen], SIDE))
        accuracy = (net.head(guess).argmax(1) == labels[unseen]).float().mean().item()
    return Judge(train_reader(size, seed), net.eval(), accuracy)
