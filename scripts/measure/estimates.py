"""What samples say about what they were drawn from: intervals of shares, and the distance of two sets of features."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % of the normal distribution.
NORMAL_95 = 1.959964


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable Inference, the Law of Succession").

    Raises:
        ValueError: If it is no share.
    """
    if of < 1 or not 0 <= right <= of:
        raise ValueError(f"{right} of {of} is no share: at least one sample, and no more right than there are")
    z = NORMAL_95
    share, scale = right / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / scale
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / scale
    # Rounding must not put an end beyond what the interval contains for certain.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Frechet distance of two sets of features [N, F], each taken as a Gaussian.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, section 2 of the appendix's FID). The root's
    trace is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric.

    Raises:
        ValueError: If a set has fewer than two rows or the widths differ.
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(f"features {one.shape} and {other.shape} must be [N, F] with the same F and N of at least 2")
    means = one.mean(0) - other.mean(0)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(first))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.atleast_2d(second) @ root).clip(0)).sum()
    return float(means @ means + np.trace(np.atleast_2d(first + second)) - 2 * cross)


def main_axes(features: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], float]:
    """The directions [F, count] in which features [N, F] vary most, and the share of their variance that these keep.

    Raises:
        ValueError: If there are not as many.
    """
    if count > min(features.shape[1], len(features) - 1):
        raise ValueError(f"{count} axes of {len(features)} features of width {features.shape[1]}: pass fewer")
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(features, rowvar=False)))
    return vectors[:, ::-1][:, :count], float(values[::-1][:count].sum() / values.sum())
