"""Starting a kernel: on the right device, with every option that Triton's releases disagree on set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Triton's default of this option changes between releases: what is fused is part of the numbers.
FUSION = {"enable_fp_fusion": True}


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def programs(given: dict[str, Any]) -> tuple[int]:
    """The launch grid of a kernel along tile lists: a program for each row tile of each (sample, head) pair."""
    return ((given["dense_rows"] + given["grid_rows"]) * given["pairs"],)


def launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], warps: int, stages: int) -> None:
    """Start a kernel on the current device."""
    kernel[grid](**given, num_warps=warps, num_stages=stages, **FUSION)
