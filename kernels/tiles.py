"""The CPU engine: any tile plan as cache-sized batches of small dense attentions."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from visattn.backends import Backend, Call, Problem, Support, visited_pairs
from visattn.kernels.tiles_boxes import axis_classes, box_groups
from visattn.kernels.tiles_engine import TileAttention, Work
from visattn.kernels.tiles_groups import Group, list_groups, routed_group, whole_sequence
from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.patterns.geometry import Spans
from visattn.plans import plan


class Tiles(Backend):
    """Queries in tiles, each with exactly the keys its plan lists; torch's fused CPU kernel inside."""

    name: ClassVar[str] = "tiles"

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Any pattern that is a list of key tiles."""
        if problem.pattern.composed:
            return Support(False, f"{problem.pattern.name} is not a list of key tiles")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """Visited pairs."""
        return 1.6 * visited_pairs(problem) + 3e6

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        work = Work(_groups(q, k, call), call.scale, call.key_mask)
        return TileAttention.apply(q, k, v, call.rpb, work)


def _groups(q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[Group, ...]:
    pattern, layout = call.pattern, call.layout
    if pattern.routed and not pattern.covers(layout.grid):
        tiles = plan(pattern, layout)
        dense, fixed = _dense(pattern, layout, q.device)
        return routed_group(tiles, pattern.route(q, k, tiles), fixed), *dense
    return _static_groups(pattern, layout, q.device, call.rpb is not None)


@lru_cache(maxsize=64)
def _dense(pattern: Pattern, layout: Layout, device: torch.device) -> tuple[tuple[Group, ...], torch.Tensor | None]:
    """The problem of the dense queries, and the dense and pooled key tokens."""
    suffix = layout.prefix + layout.tokens
    own = np.concatenate([np.arange(layout.prefix), np.arange(suffix, layout.length)])
    extra = pattern.extra_keys(layout.grid)
    fixed = np.concatenate([own, np.arange(layout.length, layout.length + extra)])
    groups = (whole_sequence(own, layout.length, device),) if len(own) else ()
    return groups, torch.from_numpy(fixed).to(device) if len(fixed) else None


@lru_cache(maxsize=64)
def _static_groups(pattern: Pattern, layout: Layout, device: torch.device, rpb: bool) -> tuple[Group, ...]:
    """The problems of a pattern that does not look at q and k."""
    extra = pattern.extra_keys(layout.grid)
    if pattern.covers(layout.grid) and not extra and not rpb:
        return (whole_sequence(np.arange(layout.length), layout.length, device),)
    dense, fixed = _dense(pattern, layout, device)
    spans = axis_spans(pattern, layout.grid)
    if spans is None:
        return *list_groups(plan(pattern, layout), device), *dense
    sides = pattern.rpb_shape(layout.grid) if rpb else None
    windows = None if sides is None else tuple(side // 2 + 1 for side in sides)
    box = pattern.tile(layout.grid)
    axes = [axis_classes(s, size) for s, size in zip(spans, box, strict=True)]
    return *box_groups(layout, axes, windows, fixed, device), *dense


def axis_spans(pattern: Pattern, grid: tuple[int, ...]) -> list[Spans] | None:
    """The keys of each query per axis, if the pattern is one interval of keys per axis."""
    spans = getattr(pattern, "spans", None)
    return None if spans is None else spans(grid)


backend = Tiles()
