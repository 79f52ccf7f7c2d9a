"""How much of the exact attention of a call falls on what its pattern lists."""

from __future__ import annotations

import torch

from visattn.kernels.heads import best_patterns
from visattn.kernels.rows import attention_rows, visible_rows
from visattn.layout import Layout
from visattn.patterns import (
    Best,
    DynamicPattern,
    Gate,
    Gated,
    HybridPattern,
    ListedPattern,
    OrderedPattern,
    Pattern,
    PerHead,
)
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.stratified import sampled_rows
from visattn.patterns.tailed import holding
from visattn.problem import Call
from visattn.watch import Watched


def caught_mass(watched: Watched, layout: Layout, some: slice, rows: int) -> torch.Tensor | None:
    """Share of the exact attention of some grid queries on what they see: [B, H]; None where that is no list.

    Args:
        watched: The call.
        layout: Where the tokens of these samples sit.
        some: Which samples.
        rows: How many queries at most.
    """
    pattern = watched.pattern
    while isinstance(pattern, Gated):
        pattern = pattern.of
    lists = ListedPattern | OrderedPattern | PerHead | Best | Gate | HybridPattern
    if pattern.covers(layout.grid) or not isinstance(pattern, lists):
        return None
    q, k, v = (t[some] for t in (watched.q, watched.k, watched.v))
    mask = None if watched.key_mask is None else watched.key_mask[some]
    options = {"scale": watched.scale, "key_mask": mask}
    index = sampled_rows(layout, rows, q.device)
    with torch.no_grad():
        dense = attention_rows(q, k, "dense", layout, index, **options)
        own = _seen(pattern, q, k, v, layout, index, watched, mask)
        found = (dense * own).sum(-1)
        if mask is None:
            return found.mean(-1)
        there = mask[:, index][:, None]
        return (found * there).sum(-1) / there.sum(-1).clamp(min=1)


def _seen(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    rows: torch.Tensor,
    watched: Watched,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which tokens some queries see: bool [1 or B, 1 or H, R, S]."""
    given = (layout, rows, q, k, mask, watched.scale)
    if isinstance(pattern, OrderedPattern):
        found = pattern.cluster(q, k, layout, mask, watched.scale)
        at = inner(layout)
        index = (rows - layout.prefix).expand(*q.shape[:1], q.shape[2], -1)
        which = found.queries.gather(2, index if found.copied is None else found.copied.gather(2, index))
        listed = found.listed.gather(2, which[..., None].expand(-1, -1, -1, found.listed.shape[3]))
        seen = torch.ones(*listed.shape[:3], layout.length, dtype=torch.bool, device=q.device)
        seen[..., at] = listed.gather(3, found.keys[:, :, None].expand(-1, -1, len(rows), -1))
        return seen
    if isinstance(pattern, Gate):
        with holding(pattern.by, pattern.choose(q, k, layout, mask, watched.parameters)):
            return _seen(pattern.by, q, k, v, layout, rows, watched, mask)
    if isinstance(pattern, HybridPattern):
        choice = pattern.choose(q, k, layout, mask, watched.scale, watched.parameters)
        with holding(pattern.front, choice):
            return _seen(pattern.front, q, k, v, layout, rows, watched, mask)
    if isinstance(pattern, PerHead | Best):
        parts = [_seen(each, q, k, v, layout, rows, watched, mask) for each in pattern.patterns]
        whole = torch.stack([each.expand(*q.shape[:1], q.shape[2], len(rows), layout.length) for each in parts])
        if isinstance(pattern, PerHead):
            chosen = [pattern.patterns.index(each) for each in pattern.of_heads(q.shape[2])]
            chosen = torch.tensor(chosen, device=q.device).expand(q.shape[0], -1)
        else:
            chosen = best_patterns(q, k, v, Call(pattern, layout, watched.scale, mask))
        return whole.gather(0, chosen[None, :, :, None, None].expand(1, *whole.shape[1:]))[0]
    if isinstance(pattern, DynamicPattern):
        pattern = pattern.front
        own = pattern.token_mask(pattern.choose(q, k, layout, mask, watched.scale), layout, rows - layout.prefix)
        return torch.nn.functional.pad(own, (layout.prefix, layout.suffix), value=True)
    assert isinstance(pattern, ListedPattern)
    return visible_rows(pattern, *given)[..., : layout.length]
