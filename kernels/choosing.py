"""What choosing costs on a CPU beside scores of means: other scores, tests, small blocks, and what is added behind."""

from __future__ import annotations

import torch

from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.scores import Score
from visattn.patterns.ordered import Carried
from visattn.problem import Problem

# All of these are per head, in channels of dense attention, for each ... (docs/cpu-engine.md has the measurement):
# ... pair of blocks, or of parts of blocks, that is scored and picked from; as much again where scores are sorted, ...
BLOCK_PAIR, PART_PAIR, SORTED_PAIR = 800.0, 320.0, 800.0
# ... pair of tokens whose small integers are multiplied, or that the test of `skip` looks at, ...
LOWBIT_PAIR, SKIP_PAIR = 120.0, 100.0
# ... and pair of runs along whose antidiagonals products are summed.
RUN_PAIR = 120.0
# The products in these, in pairs: for each pair of tokens, and for a pair of runs of one token.
LOWBIT, SKIP, RUN = 1.5, 0.6, 0.5
# Pairs for each token: bounds of blocks, runs in a row, how alike tokens are.
BOUNDS_TOKEN, RUN_TOKEN, ALIKE_TOKEN = 190.0, 100.0, 50.0
# Pairs for each token of what is added behind the softmax; a slope has scores of queries and pooled keys besides.
TAIL_TOKEN = {"slope": 150.0, "linear": 300.0, "coarse": 120.0}
SLOPE_PAIR = 350.0


def unshared(pairs: float) -> float:
    """What small operators cost that share threads half as well as products do, in pairs of all threads together."""
    return pairs * (1 + torch.get_num_threads()) / 2


def on_every_token(problem: Problem, each: float) -> float:
    """Pairs that a CPU takes for every token of all heads, which are not counted on a GPU."""
    return each * problem.layout.tokens * problem.batch * problem.heads if problem.device == "cpu" else 0.0


def choosing_cost(pattern: Pattern, layout: Layout, head_dim: int) -> float:
    """Pairs per head that the choice of a pattern costs, beyond what its tokens and scores of means of 64 take.

    Args:
        pattern: Any; what chooses nothing, or in a way of its own, costs nothing here.
        layout: The tokens.
        head_dim: Channels per head.
    """
    if not isinstance(pattern, DynamicPattern) or isinstance(pattern, Carried):
        return 0.0
    blocks, tokens = pattern.blocks(layout.grid), layout.tokens
    cost = _scoring(Score.of(pattern.score), blocks, tokens, head_dim)
    each = BLOCK_PAIR + SORTED_PAIR * (pattern.name != "topk" or pattern.per != "row")
    cost += blocks.rows * blocks.columns * each / head_dim
    if pattern.skip:
        cost += tokens**2 * (SKIP + SKIP_PAIR / head_dim)
    if pattern.alike is not None:
        cost += tokens * ALIKE_TOKEN
    if pattern.rest == "slope":
        cost += tokens * blocks.columns * SLOPE_PAIR / head_dim
    return unshared(cost + tokens * TAIL_TOKEN.get(pattern.rest, 0.0))


def _scoring(score: Score, blocks: Blocks, tokens: int, head_dim: int) -> float:
    """What scores take beyond the products of means."""
    if score.name == "lowbit":
        return tokens**2 * (LOWBIT + LOWBIT_PAIR / head_dim)
    if score.name == "diagonal":
        runs = tokens / score.number
        return runs**2 * (RUN * score.number + RUN_PAIR / head_dim) + tokens * RUN_TOKEN
    if score.name == "parts":
        return blocks.rows * score.query_parts * blocks.columns * score.key_parts * PART_PAIR / head_dim
    return tokens * BOUNDS_TOKEN if score.name == "bounds" else 0.0
