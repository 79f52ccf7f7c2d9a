"""The teacher's attention mass on blocks of keys, as the target of whatever scores blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Gate, Pattern
from visattn.patterns.choice.blocks import Blocks, inner
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.scores import Score, block_scores
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.targets import block_attention, by_tokens, divergence
from visattn.watch import Watched

SMOOTH = ("mean", "parts", "bounds", "diagonal")  # scores that have gradients


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
        some = (self._places * blocks.rows).long()
        # A gate is trained by the largest weights of blocks, as in its paper.
        pool = "max" if isinstance(ours.pattern, Gate) else "sum"
        target = block_attention(theirs.q, theirs.k, layout, blocks, theirs.key_mask, theirs.scale, pool, some)
        scores, seen = router_scores(ours, layout)
        seen = Seen(None if seen.rows is None else seen.rows[:, some], seen.columns)
        return divergence(scores[:, :, some], target, seen, self._temperature)

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
    if isinstance(pattern, Gate | HybridPattern):
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
    if isinstance(pattern, HybridPattern):
        if getattr(pattern, "router", "") == "learned":
            q, k = q.detach(), k.detach()
        given = layout, watched.key_mask, watched.scale, watched.parameters
        scores, seen = pattern.router_scores(q, k, *given)
        return by_tokens(scores, pattern.blocks(layout.grid), layout, watched.key_mask), seen
    assert isinstance(pattern, DynamicPattern)
    valid, blocks = None if watched.key_mask is None else watched.key_mask[:, at], pattern.blocks(layout.grid)
    seen, found = block_scores(Score.of(pattern.score), q[:, at], k[:, at], blocks, valid, watched.scale)
    return by_tokens(torch.cat([scores for scores, _ in found], 1), blocks, layout, watched.key_mask), seen


def _sample(watched: Watched, i: int) -> Watched:
    """One sample of a call, still as a batch."""
    at = slice(i, i + 1)
    mask = None if watched.key_mask is None else watched.key_mask[at]
    return watched._replace(q=watched.q[at], k=watched.k[at], v=watched.v[at], out=watched.out[at], key_mask=mask)
