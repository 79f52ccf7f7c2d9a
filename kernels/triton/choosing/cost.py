"""What choosing costs the device, for the rule that picks a backend."""

from __future__ import annotations

import math

from visattn.dispatch import Problem
from visattn.patterns import DynamicPattern
from visattn.patterns.choice.scores import Score

# Microseconds of the kernels: fixed, per byte of q and k, and per place of a row of scores, which has a power of two.
# Fitted to choices of 24 heads of 128 on 256x256 and 30x45x88, blocks of 64 x 64 and of 128 x 64, on an H200.
FIXED_US, BYTE_US, SCORE_US = 60.0, 0.5e-6, 17.5e-6
# How many times longer torch's operators take, on the same cases.
BY_TORCH = 3.0


def choosing_us(problem: Problem) -> float:
    """Microseconds that a dynamic pattern's choice takes."""
    pattern, layout = problem.pattern, problem.layout
    assert isinstance(pattern, DynamicPattern)
    blocks, score = pattern.blocks(layout.grid), Score.of(pattern.score)
    read = problem.batch * layout.tokens * (problem.heads + problem.kv_heads) * problem.head_dim
    parts = score.query_parts * score.key_parts
    scores = problem.batch * problem.heads * blocks.rows * (1 << (blocks.columns - 1).bit_length())
    time = FIXED_US + BYTE_US * read * problem.dtype.itemsize + SCORE_US * scores * math.sqrt(parts)
    return time if _by_kernels(pattern, score, layout.grid) else BY_TORCH * time


def _by_kernels(pattern: DynamicPattern, score: Score, grid: tuple[int, ...]) -> bool:
    """Whether the kernels choose; importing them takes Triton."""
    from visattn.kernels.triton.choosing.choose import LARGEST, parts_of, rule_of

    blocks = pattern.blocks(grid)
    return rule_of(pattern, blocks) is not None and parts_of(score) is not None and blocks.columns <= LARGEST
