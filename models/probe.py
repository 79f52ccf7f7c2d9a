"""Efficient probing: learned queries read the tokens of a frozen backbone, and a linear classifier what they found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# The paper's protocol.
QUERIES, EPOCHS, BATCH, RATE = 32, 90, 4096, 0.1


class EfficientProbe(nn.Module):
    """Attentive pooling with queries but no key projection: query m pools its own part of the values.

    A = softmax(c x^T / sqrt(C)) for M learned queries c [M, C], values x W cut in M groups, group m of the output is
    A_m v_m. Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency"
    (ICLR 2026); its parameters are named as there.
    """

    def __init__(self, width: int, queries: int = QUERIES, d_out: int = 1) -> None:
        """Make a probe.

        Args:
            width: Channels C of the tokens.
            queries: How many queries M; they divide C / d_out.
            d_out: By how much the values are narrower than the tokens.

        Raises:
            ValueError: If the numbers do not divide each other.
        """
        super().__init__()
        if min(width, queries, d_out) < 1 or width % d_out or (width // d_out) % queries:
            raise ValueError(f"queries={queries} must divide {width} channels by d_out={d_out}, and d_out the channels")
        self.cls_token = nn.Parameter(torch.empty(1, queries, width))
        self.v = nn.Linear(width, width // d_out, bias=False)
        nn.init.normal_(self.cls_token, std=0.02)

    def maps(self, tokens: torch.Tensor) -> torch.Tensor:
        """What each query looks at: [B, M, N]."""
        return ((self.cls_token @ tokens.transpose(1, 2)) / math.sqrt(tokens.shape[2])).softmax(-1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N, C] pooled: [B, C / d_out]."""
        maps = self.maps(tokens)
        values = self.v(tokens).unflatten(2, (maps.shape[1], -1))
        return torch.einsum("bmn,bnmd->bmd", maps, values).flatten(1)


class Classifier(nn.Module):
    """The probe, batch norm without affine and a linear classifier."""

    def __init__(self, probe: EfficientProbe, classes: int) -> None:
        super().__init__()
        width = probe.v.out_features
        self.probe, self.norm, self.head = probe, nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of classes [B, classes] of tokens [B, N, C]."""
        return self.head(self.norm(self.probe(tokens)))


@dataclass(frozen=True)
class Probed:
    """What a probe learned.

    Attributes:
        classifier: The trained probe and classifier.
        accuracy: Share of the held-out images whose class it knows.
        loss: Mean cross entropy of the last epoch.
    """

    classifier: Classifier
    accuracy: float
    loss: float


@torch.no_grad()
def tokens_of(model: nn.Module, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tokens of the grid of a timm model, without class token and registers: [N, tokens, C] in float32 on the CPU.

    Args:
        model: In evaluation mode.
        images: Batches [B, channels, height, width].

    Raises:
        ValueError: If its features are neither tokens nor maps.
    """
    found, device = [], next(model.parameters()).device
    for x in images:
        features = model.forward_features(x.to(device))  # type: ignore[operator]
        if isinstance(features, torch.Tensor) and features.ndim == 4:
            last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        elif isinstance(features, torch.Tensor) and features.ndim == 3:
            features = features[:, getattr(model, "num_prefix_tokens", 0) :]
        else:
            raise ValueError(
                f"features of {type(model).__name__} are neither tokens [B, N, C] nor maps: it has no probe"
            )
        found.append(features.float().cpu())
    return torch.cat(found)


def train(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    held_out: tuple[torch.Tensor, torch.Tensor],
    *,
    queries: int = QUERIES,
    d_out: int = 1,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    rate: float = RATE,
    seed: int = 0,
) -> Probed:
    """Train a probe on the tokens of a frozen backbone: LARS without weight decay, cosine rate, as in the paper.

    Args:
        tokens: [N, tokens, C].
        labels: Classes from 0 [N].
        held_out: Tokens and labels whose accuracy is measured.
        queries: As in `EfficientProbe`.
        d_out: Likewise.
        epochs: Rounds through all tokens.
        batch: Images at once, at most.
        rate: Base learning rate, of 256 images at once.
        seed: Of weights and order.

    Raises:
        ValueError: If there is nothing to learn from, or a number is out of range.
    """
    from timm.optim.lars import Lars

    if len(tokens) < 2 or len(tokens) != len(labels) or min(epochs, batch) < 1 or rate <= 0:
        raise ValueError(
            f"{len(tokens)} images with {len(labels)} labels, epochs={epochs}, batch={batch}, rate={rate}: give two "
            "labelled images at least, and positive numbers"
        )
    torch.manual_seed(seed)
    classes = int(max(labels.max(), held_out[1].max())) + 1
    model = Classifier(EfficientProbe(tokens.shape[2], queries, d_out), classes)
    # Whole batches: the last few images of a round would be too few for a mean and variance.
    size = min(batch, len(tokens))
    rounds = len(tokens) // size
    options: Any = {"lr": rate * size / 256, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = Lars(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * rounds)
    order, total = torch.Generator().manual_seed(seed), 0.0
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(tokens), generator=order, device="cpu")[: rounds * size].split(size):
            loss = F.cross_entropy(model(tokens[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) / rounds
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in _parts(held_out, size))
    return Probed(model, right / len(held_out[1]), total)


def _parts(pair: tuple[torch.Tensor, torch.Tensor], size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return zip(pair[0].split(size), pair[1].split(size), strict=True)


def halves(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of images to train with and to hold out: every other one of each class.

    Raises:
        ValueError: If a class has fewer than two images, or there is only one class.
    """
    classes = labels.unique()
    counts = [int((labels == each).sum()) for each in classes]
    if len(classes) < 2 or min(counts) < 2:
        raise ValueError(
            f"{len(classes)} classes with {min(counts)} images at least: a probe needs two classes of two each"
        )
    where = [(labels == each).nonzero()[:, 0] for each in classes]
    return torch.cat([each[::2] for each in where]), torch.cat([each[1::2] for each in where])
