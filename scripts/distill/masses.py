"""The teacher's attention mass on blocks of keys, as the target of whatever scores blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Gate, Pattern
from visattn.patterns.choice.blocks import Blocks, inner, token_block_table, token_blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.scores import Score, block_scores
from visattn.watch import Watched

SMOOTH = ("mean", "parts", "bounds", "diagonal")  # scores that have gradients
LEAST = 1e-6  # of a share of the mass


class Masses:
    """Compares the scores of a student's blocks with the mass that its teacher's attention puts on them.

    Give `teacher` and `student` to `Handle.watch` of each, and run one forward of both inside `of`, the teacher first.

    Attributes:
        losses: Kullback-Leibler divergence at each module.
    """

    def __init__(self) -> None:
        self.losses: dict[str, torch.Tensor] = {}
        self._truth: dict[str, Watched] = {}
        self._on = False

    @contextmanager
    def of(self, places: torch.Tensor, temperature: float) -> Iterator[None]:
        """Context in which calls are compared.

        Args:
            places: Query blocks that are compared, as shares of them from 0 to below 1 [R].
            temperature: Divides the logarithms of both distributions: above 1 blocks with little mass count more.
        """
        self.losses, self._places, self._temperature, self._on = {}, places, temperature, True
        try:
            yield
        finally:
            self._on, self._truth = False, {}

    def teacher(self, watched: Watched) -> None:
        """Keeps what the teacher's call had."""
        if self._on:
            self._truth[watched.site] = watched

    def student(self, watched: Watched) -> None:
        """Compares a call of the student."""
        truth = self._truth.pop(watched.site, None) if self._on else None
        if truth is None or reason(watched.pattern):
            return
        found, several = [], len(watched.layouts) > 1
        with torch.autocast(watched.q.device.type, enabled=False):
            for i, layout in enumerate(watched.layouts):
                ours, theirs = (_sample(each, i) if several else each for each in (watched, truth))
                found.append(self._divergence(ours, theirs, layout))
        self.losses[watched.site] = torch.stack(found).mean()

    def _divergence(self, ours: Watched, theirs: Watched, layout: Layout) -> torch.Tensor:
        blocks = blocks_of(ours.pattern, layout)
        rows = (self._places * blocks.rows).long()
        scores, seen = router_scores(ours, layout)
        with torch.no_grad():
            mass = block_mass(theirs, layout, blocks, rows)
            target = (mass.clamp(min=LEAST).log() / self._temperature).log_softmax(-1)
        scores = scores[:, :, rows] / self._temperature
        if seen.columns is not None:
            hidden = ~seen.columns[:, None, None]
            scores, target = (x.masked_fill(hidden, -1e9) for x in (scores, target))
        found = (target.exp() * (target - scores.log_softmax(-1))).sum(-1)
        if seen.rows is not None:
            found = found * seen.rows[:, None, rows]
        return found.mean()

    def loss(self) -> torch.Tensor:
        """Mean over the modules of the last forward.

        Raises:
            ValueError: If there were none.
        """
        if not self.losses:
            raise ValueError("--mass cannot see the queries and keys of this model's attention: leave it out")
        return torch.stack(list(self.losses.values())).mean()


def reason(pattern: Pattern) -> str:
    """Why a pattern has no scores of blocks that could learn, empty if it has."""
    if isinstance(pattern, Gate):
        return ""
    if not isinstance(pattern, DynamicPattern) or pattern.name not in ("topk", "topp", "above"):
        return f"{pattern} chooses no blocks by scores"
    name = Score.of(pattern.score).name
    return "" if name in SMOOTH else f"score={pattern.score} of {pattern} has no gradient"


def blocks_of(pattern: Pattern, layout: Layout) -> Blocks:
    """The blocks that a pattern chooses from."""
    by: Any = pattern.by if isinstance(pattern, Gate) else pattern
    return by.blocks(layout.grid)


def router_scores(watched: Watched, layout: Layout) -> tuple[torch.Tensor, Seen]:
    """Scores [B, H, rows, columns] by which a call's pattern chooses, with gradients, and which blocks take part.

    Those of maps that learn have gradients of these alone; scores of a rule have those of queries and keys.
    """
    pattern, at, q, k = watched.pattern, inner(layout), watched.q.float(), watched.k.float()
    if isinstance(pattern, Gate):
        return pattern.scores(q.detach(), k.detach(), layout, watched.key_mask, watched.parameters)
    assert isinstance(pattern, DynamicPattern)
    valid = None if watched.key_mask is None else watched.key_mask[:, at]
    seen, found = block_scores(
        Score.of(pattern.score), q[:, at], k[:, at], pattern.blocks(layout.grid), valid, watched.scale
    )
    return torch.cat([scores for scores, _ in found], 1), seen


def block_mass(watched: Watched, layout: Layout, blocks: Blocks, rows: torch.Tensor) -> torch.Tensor:
    """Share of the dense attention of query blocks on each key block of the grid, means over their valid queries.

    Args:
        watched: The call.
        layout: Where its tokens sit.
        blocks: The blocks.
        rows: Which query blocks [R].

    Returns:
        [B, H, R, columns], which sum to 1: text has no part.
    """
    device, at = watched.q.device, inner(layout)
    q, k = watched.q.float(), watched.k.float()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    table = _tokens(blocks.grid, blocks.queries, device)[rows.to(device)]
    there, tokens = table >= 0, table.clamp(min=0) + layout.prefix
    scores = torch.einsum("brhd,bkhd->bhrk", q[:, tokens.flatten()], k) * watched.scale
    there = there.flatten()[None, None, :, None]
    if watched.key_mask is not None:
        scores = scores.masked_fill(~watched.key_mask[:, None, None], float("-inf"))
        there = there & watched.key_mask[:, None, tokens.flatten(), None]
    weights = scores.softmax(-1)[..., at] * there
    # Sums over blocks as a product: they may be of unequal size.
    of_key = torch.nn.functional.one_hot(token_blocks(blocks.grid, blocks.keys, device), blocks.columns).float()
    mass = (weights @ of_key).unflatten(2, table.shape).sum(3)
    return mass / mass.sum(-1, keepdim=True).clamp(min=LEAST)


@kept
def _tokens(grid: tuple[int, ...], box: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Tokens of each block [blocks, most], -1 behind the last."""
    block = token_block_table(grid, box)
    order, sizes = np.argsort(block, kind="stable"), np.bincount(block)
    found = np.full((len(sizes), sizes.max()), -1)
    found[block[order], np.arange(len(block)) - (np.cumsum(sizes) - sizes)[block[order]]] = order
    return torch.from_numpy(found).to(device)


def _sample(watched: Watched, i: int) -> Watched:
    """One sample of a call, still as a batch."""
    at = slice(i, i + 1)
    mask = None if watched.key_mask is None else watched.key_mask[at]
    return watched._replace(q=watched.q[at], k=watched.k[at], v=watched.v[at], out=watched.out[at], key_mask=mask)
