"""What choosing costs the device, for the rule that picks a backend."""

from __future__ import annotations

from visattn.dispatch import Problem
from visattn.kernels.triton.config import SHARING
from visattn.patterns import DynamicPattern, TopP
from visattn.patterns.choice.scores import Score
from visattn.patterns.shared_tiles import sharing_tiles

# Microseconds of the kernels: fixed, per byte that is read for means, and per place of a row of scores, which has a
# power of two. Fitted to choices of 24 heads of 128 on 256x256 and 30x45x88, blocks of 64 x 64 and of 128 x 64, on an
# H200 (docs/results/h200-dynamic.json).
FIXED_US, BYTE_US, SCORE_US = 60.0, 0.31e-6, 11e-6
# How much more places of a row cost with so many pairs of parts, and where probabilities are summed.
PART_POWER, BY_MASS = 0.75, 2.0
# How much more places of longer rows cost, from so many on.
LONG_ROW, BY_LONG_ROW = 4096, 1.5
# Of rests: per entry of a list and word of bits of what it lists, and for `slope` per byte of keys and values.
BITS_US, MOMENT_US = 0.37e-6, 0.65e-6
# ... and where a call has gradients, per product of a query with a pooled key by operators of torch.
TAIL_US = 33e-6
# How many times longer torch's operators take, on the same cases.
BY_TORCH = 5.0
# What tiles visit that several blocks share is found by some thirty operators, which keep host and device 5 us each and
# move about 40 bytes for each pair of blocks, at 3 TB/s. Not measured.
MERGE_US, MARK_US = 150.0, 13e-6


def choosing_us(problem: Problem) -> float:
    """Microseconds that a dynamic pattern's choice takes."""
    pattern, layout = problem.pattern, problem.layout
    assert isinstance(pattern, DynamicPattern)
    blocks, score = pattern.blocks(layout.grid), Score.of(pattern.score)
    # Pooled keys and values are means too.
    heads = problem.heads + (3 if pattern.pools_rest else 1) * problem.kv_heads
    item = problem.dtype.itemsize
    read = problem.batch * layout.tokens * heads * problem.head_dim * item
    places, rows = 1 << (blocks.columns - 1).bit_length(), problem.batch * problem.heads * blocks.rows
    scores = rows * places * (BY_LONG_ROW if places > LONG_ROW else 1)
    scores *= (score.query_parts * score.key_parts) ** PART_POWER * (BY_MASS if isinstance(pattern, TopP) else 1)
    time = FIXED_US + BYTE_US * read + SCORE_US * scores
    time *= 1 if _by_kernels(pattern, score, layout.grid) else BY_TORCH
    if pattern.pools_rest:
        time += BITS_US * rows * pattern.expected(blocks) * blocks.columns * blocks.columns / 32
    if pattern.rest == "slope":
        time += MOMENT_US * problem.batch * layout.tokens * 2 * problem.kv_heads * problem.head_dim * item
        time += TAIL_US * problem.batch * problem.heads * layout.tokens * blocks.columns * problem.grad
    return time


def sharing_us(problem: Problem) -> float:
    """Microseconds in which operators of torch find what tiles visit that several query blocks share, 0 elsewhere."""
    pattern, layout = problem.pattern, problem.layout
    if problem.precision is not None or sharing_tiles(pattern, layout, SHARING) is None:
        return 0.0
    assert isinstance(pattern, DynamicPattern)
    blocks = pattern.blocks(layout.grid)
    return MERGE_US + MARK_US * problem.batch * problem.heads * blocks.rows * blocks.columns


def _by_kernels(pattern: DynamicPattern, score: Score, grid: tuple[int, ...]) -> bool:
    """Whether the kernels choose; importing them takes Triton."""
    from visattn.kernels.triton.choosing.choose import LARGEST, parts_of, rule_of

    blocks = pattern.blocks(grid)
    return rule_of(pattern, blocks) is not None and parts_of(score) is not None and blocks.columns <= LARGEST
