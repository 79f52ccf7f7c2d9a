"""How many heads are scored at a time: no scores of all heads exist at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Scores that exist at a time, in numbers: few on a CPU, whose caches are small, many where launches cost.
SCORES = {"cpu": 2**22}
SCORES_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Slices:
    """Which heads are scored together.

    Attributes:
        together: So many neighbouring heads always are.
        all: Whether all of them are.
    """

    together: int = 1
    all: bool = False

    def of(self, query: torch.Tensor, columns: int, kv_heads: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some query heads of queries [B, H, ..., D] at a time, and the key head of each."""
        batch, heads = query.shape[:2]
        rows = query.shape[2:-1].numel()
        budget = SCORES.get(query.device.type, SCORES_ELSEWHERE)
        each = max(1, budget // max(1, batch * rows * columns))
        each = heads if self.all else max(1, each // self.together) * self.together
        group = heads // kv_heads
        for first in range(0, heads, each):
            some = slice(first, min(first + each, heads))
            yield some, torch.arange(some.start, some.stop, device=query.device) // group
