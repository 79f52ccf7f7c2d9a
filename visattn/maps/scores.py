"""Whether a map shows what a classifier needs: scores of any saliency map, from the images that it masks."""

from __future__ import annotations

import torch

from visattn.given import real, tensor


def average_drop(plain: torch.Tensor, masked: torch.Tensor) -> float:
    """Mean of max(0, p - p') / p, where p' is the class' probability on the image times its map; smaller is better.

    Args:
        plain: Probability of the predicted class of each image [N].
        masked: Of the same class on the image times its map [N].

    Raises:
        ValueError: If these are not as many probabilities.
    """
    plain, masked = _checked(plain, masked)
    return float(((plain - masked).clamp(min=0) / plain.clamp(min=1e-12)).mean())


def confidence_gain(plain: torch.Tensor, masked: torch.Tensor) -> float:
    """Share of images whose class gets more likely when they are masked (increase in confidence); larger is better.

    Args:
        plain: As in `average_drop`.
        masked: Likewise.

    Raises:
        ValueError: If these are not as many probabilities.
    """
    plain, masked = _checked(plain, masked)
    return float((masked > plain).double().mean())


def top_share(maps: torch.Tensor, share: float) -> torch.Tensor:
    """Maps that keep the largest so many values of each, in [0, 1], and are 0 elsewhere.

    Args:
        maps: Any maps [N, ...].
        share: Share of the values that are kept, above 0 to 1; the protocol takes 1, 0.5 and 0.15.

    Raises:
        ValueError: If the share is out of range.
    """
    share = real(share, "share", "above 0 and at most 1", lambda x: 0 < x <= 1)
    if tensor(maps, "maps", "[N, ...]").ndim < 2 or maps.is_complex() or not maps.numel():
        raise ValueError(f"maps {list(maps.shape)} of {maps.dtype} must be real maps [N, ...] with values")
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    scaled = (flat - low) / (high - low).clamp(min=1e-12)
    count = max(1, round(share * flat.shape[1]))
    best = scaled.topk(count, 1).indices
    return torch.zeros_like(scaled).scatter(1, best, scaled.gather(1, best)).view_as(maps)


def _checked(plain: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, given in (("plain", plain), ("masked", masked)):
        if tensor(given, name, "of probabilities [N]").is_complex():
            raise ValueError(f"{name} is {given.dtype} and must be probabilities [N]: real numbers")
    if plain.ndim != 1 or plain.shape != masked.shape or not len(plain):
        raise ValueError(
            f"plain {list(plain.shape)} and masked {list(masked.shape)} must be probabilities [N] of the same"
        )
    return plain.double(), masked.double()
