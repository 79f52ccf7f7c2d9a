"""The half of a batch that has the prompt, where a pipeline stacks predictions with and without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


def half_of(value: Any, batch: int, half: slice) -> Any:
    """The same arguments for one half of the batch; what has no batch axis stays.

    Args:
        value: A tensor, or tensors in lists, tuples and mappings.
        batch: Samples, an even number.
        half: Which of them.
    """
    if isinstance(value, torch.Tensor):
        return value[half] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: half_of(each, batch, half) for key, each in value.items()}
    if isinstance(value, list) and len(value) == batch and not _nested(value, batch):
        # Samples of sizes of their own.
        return value[half]
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(half_of(each, batch, half) for each in value)
    return value


def _nested(value: list[Any], batch: int) -> bool:
    """Whether a list holds batches rather than samples."""
    return all(isinstance(each, torch.Tensor) and each.ndim and each.shape[0] == batch for each in value)


def prediction_of(output: Any) -> Any:
    """The prediction in what a model returned: a tensor, or a list of them."""
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, prediction: Any) -> Any:
    """What a model returned, with another prediction."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return dataclasses.replace(output, sample=prediction)


def corrected(prediction: Any, perturbed: Any, weight: float, half: slice) -> Any:
    """A prediction [B, ...] with `weight` times what its half differs by from the perturbed one [B / 2, ...] added.

    Lists of one tensor for each sample are taken as such.
    """
    if isinstance(prediction, torch.Tensor):
        found = prediction.clone()
        found[half] += weight * (prediction[half] - perturbed)
        return found
    found = list(prediction)
    pairs = zip(found[half], perturbed, strict=True)
    found[half] = [corrected(plain, other, weight, slice(None)) for plain, other in pairs]
    return found
