"""Sums over all tokens in parts of their own, where a program for each head would not fill a GPU."""

from __future__ import annotations

import torch

# In the interpreter: more than one, of unequal length.
INTERPRETED = 3


def splits_of(length: int, programs: int, rows: int, resident: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a split and the number of splits, such that all programs run at once and each has several steps.

    Args:
        length: Tokens.
        programs: Programs of each split.
        rows: Tokens of a step; on a GPU splits are whole steps.
        resident: Programs that run at once on a multiprocessor.
        device: Where they run.
    """
    if device.type != "cuda":
        tokens = -(-length // INTERPRETED)
    else:
        at_once = resident * torch.cuda.get_device_properties(device).multi_processor_count
        wanted = max(1, min(at_once // programs, length // (4 * rows)))
        tokens = -(-length // (wanted * rows)) * rows
    return tokens, -(-length // tokens)
