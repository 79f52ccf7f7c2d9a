"""The CPU engine: any tile plan as cache-sized batches of small dense attentions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from visattn.dispatch import Backend, Prepared, overhead
from visattn.keep import kept
from visattn.kernels.choosing import choosing_cost, unshared
from visattn.kernels.tiles.batches import Work, batch_size
from visattn.kernels.tiles.boxes import AxisKinds, box_groups
from visattn.kernels.tiles.eightbit import simulate, simulates
from visattn.kernels.tiles.engine import TileAttention, forward
from visattn.kernels.tiles.groups import Group, Problems, list_groups, listed_sequence, routed_group, whole_sequence
from visattn.kernels.tiles.heads import ALL_HEADS, Heads
from visattn.kernels.tiles.rule import (
    BATCH_MS,
    CALL_MS,
    KEPT_MS,
    ROUTE_MS,
    ROWS_PAIR,
    choose_axes,
    problem_cost,
    routed_cost,
    token_cost,
)
from visattn.layout import Layout
from visattn.operands import wants_gradient
from visattn.outdone import weigh, weighed
from visattn.patterns import (
    BiasedPattern,
    DynamicPattern,
    ListedPattern,
    Pattern,
    PooledPattern,
    RoutedPattern,
    Routes,
    SpannedPattern,
)
from visattn.patterns.choice.merging import BITS, merge
from visattn.patterns.geometry import Spans
from visattn.patterns.routing import Routing
from visattn.patterns.shared_tiles import sharing_tiles
from visattn.plans import TilePlan, plan
from visattn.problem import PRECISIONS, Call, Problem, Support

# Key tiles of a list with fewer fully visible tiles than this are cut smaller, to visit fewer hidden pairs.
MOSTLY_FULL = 0.9
SMALL_KEY_TILE = 8
# Tokens of a query block up to which blocks share a tile: one of 4x4 is as fast alone (docs/cpu-engine.md).
SHARING = 4
# How many times longer than expected lists are at least that an estimate looks at again.
LONGER = 1.1
# Time of a call whose 8 bits are simulated over the same without, and over dense attention where q and k choose, whose
# mask of all pairs is walked through: for errors, not for speed.
SIMULATED = 7.0
# What the rule, which is a CPU's, is off by on a GPU, where dense attention gains far more than what moves tiles: 3.1
# ms by it were 70, and 54 were 1557, on an H200 (windows of 3x5x5 on 69x64x96 and of 11x11x11 on 121x128x192).
ON_CUDA = 25


class Tiles(Backend):
    """Queries in tiles, each with exactly the keys its plan lists; torch's fused CPU kernel inside."""

    name: ClassVar[str] = "tiles"
    key_layouts: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Any pattern that is a list of key tiles."""
        if not isinstance(problem.pattern, ListedPattern):
            return Support(False, f"{problem.pattern.name} is not a list of key tiles")
        return Support(True) if problem.precision is None else simulates(problem)

    def cost(self, problem: Problem) -> float:
        """The measured rule: pairs, moved keys and queries, and a fixed time per batch; of routed lists, per token."""
        pattern, layout = problem.pattern, problem.layout
        problems = _problems(pattern, layout, problem.rpb, problem.listed)
        routed = _is_routed(pattern, layout)
        pairs, fixed = choosing_cost(pattern, layout, problem.head_dim) if routed else 0.0, CALL_MS
        if routed:
            n, queries, keys = problems.pop(0)
            pools = isinstance(pattern, DynamicPattern) and pattern.pools_rest
            rows = ROWS_PAIR / problem.head_dim if _rows_differ(pattern, layout) else 0.0
            pairs += n * routed_cost(queries, keys, rows) + unshared(token_cost(layout.length, pools))
            fixed += ROUTE_MS
        row = 2 * problem.kv_heads * problem.head_dim * problem.dtype.itemsize
        batches = sum(-(-problem.batch * n // batch_size(keys, row, problem.device)) for n, _, keys in problems)
        pairs += sum(n * problem_cost(queries, keys) for n, queries, keys in problems)
        fixed += batches * (BATCH_MS if routed or problem.rpb or problem.key_mask else KEPT_MS)
        if problem.precision is not None:
            return SIMULATED * (problem.dense_pairs if routed else problem.batch * problem.heads * pairs)
        total = problem.batch * problem.heads * pairs + overhead(problem, fixed, 1e3 * fixed)
        return total * (ON_CUDA if problem.device == "cuda" else 1)

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, grown: Callable[[], None]
    ) -> Prepared:
        """See `Backend.prepare`."""
        if call.precision is not None:
            return super().prepare(q, k, v, call, grown)
        if call.key_mask is not None or call.rpb is not None or _is_routed(call.pattern, call.layout):
            return super().prepare(q, k, v, call, grown)
        learns = wants_gradient(q, k, v)
        return _Kept(Work(listed_call(q, k, v, call).problems, call.scale, None, call.lse or learns), learns, grown)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        if call.precision is not None:
            return simulate(q, k, v, call)
        learns = wants_gradient(q, k, v, call.rpb)
        own = listed_call(q, k, v, call)
        q, k, v = own.tensors
        work = own.work(call.scale, call.lse or learns)
        return TileAttention.apply(q, k, v, call.rpb, work) if learns else forward(q, k, v, call.rpb, work)


class _Kept:
    """Calls whose problems depend on nothing but shapes.

    Args:
        work: The call.
        learns: Whether autograd sees it.
        grown: Called when batches have been cut, which are kept with the problems.
    """

    def __init__(self, work: Work, learns: bool, grown: Callable[[], None]) -> None:
        self._work, self._learns, self._grown, self._cut = work, learns, grown, 0

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output and log-sum-exp, see `Backend.run`."""
        work = self._work
        found = TileAttention.apply(q, k, v, None, work) if self._learns else forward(q, k, v, None, work)
        cut = len(work.problems.kept)
        if cut != self._cut:
            self._cut = cut
            self._grown()
        return found


def visited_pairs(pattern: Pattern, layout: Layout, rpb: bool = False) -> int:
    """Pairs of query and key slots that the engine computes, per sample and head."""
    problems = _problems(pattern, layout, rpb)
    return sum(number * queries * keys for number, queries, keys in problems)


def _problems(pattern: Pattern, layout: Layout, rpb: bool, listed: float | None = None) -> list[tuple[int, int, int]]:
    """Number, queries and keys of the problems of each group, for one sample; those of a routed group first.

    Args:
        pattern: The pattern.
        layout: The tokens.
        rpb: Whether a relative position bias is added.
        listed: Share of the key tiles that a routed group visits, None for what is expected.
    """
    cpu = torch.device("cpu")
    if not _is_routed(pattern, layout):
        axes = _axes(pattern, layout, rpb)
        if axes is None:
            groups, first = _static_problems(pattern, layout, cpu, rpb).groups, []
        else:
            groups, fixed = _dense(pattern, layout, cpu)
            first = _of_axes(axes, 0 if fixed is None else len(fixed))
    else:
        tiles = _routed_plan(pattern, layout)
        groups, fixed = _dense(pattern, layout, cpu)
        number = tiles.routed_tiles if listed is None else math.ceil(listed * tiles.keys.runs[1])
        keys = number * tiles.keys.capacity + (0 if fixed is None else len(fixed))
        if isinstance(pattern, DynamicPattern) and pattern.pools_rest:
            keys += pattern.blocks(layout.grid).columns
        first = [(tiles.queries.runs[1], tiles.queries.capacity, keys)]
    return [*first, *((len(group.queries), group.queries.shape[1], group.length) for group in groups)]


def _of_axes(axes: Sequence[AxisKinds], more: int) -> list[tuple[int, int, int]]:
    """The same of the grid of a pattern of intervals, whose groups need not be made for it; all see `more` keys."""
    rows = [zip(kinds.tiles.tolist(), kinds.queries.tolist(), kinds.keys.tolist(), strict=True) for kinds in axes]
    found = ([math.prod(numbers) for numbers in zip(*each, strict=True)] for each in itertools.product(*rows))
    return [(tiles, queries, keys + more) for tiles, queries, keys in found]


def _is_routed(pattern: Pattern, layout: Layout) -> bool:
    """Whether the lists depend on q and k; a routed pattern that chooses everything has nothing to choose."""
    return isinstance(pattern, RoutedPattern) and not pattern.covers(*layout.grids)


def _routed_plan(pattern: Pattern, layout: Layout) -> TilePlan:
    """The tiles of a routed pattern: its own, or larger ones of queries where its blocks are small."""
    shared = sharing_tiles(pattern, layout, SHARING)
    own = pattern if shared is None else shared
    if not isinstance(own, DynamicPattern):
        return plan(own, layout)
    grid = own.tiled_layout(layout).grid
    return plan(own, layout, (own.side_tile(grid, BITS, keys=False), own.side_tile(grid, BITS, keys=True)))


def _rows_differ(pattern: Pattern, layout: Layout) -> bool:
    """Whether rows of a query tile of lists that q and k choose see different keys of a listed tile."""
    if not isinstance(pattern, DynamicPattern):
        return False
    return pattern.blocks(layout.grid).in_order or sharing_tiles(pattern, layout, SHARING) is not None


def _weigh(routes: Routes, tiles: TilePlan) -> None:
    """Ask whoever wants to know whether lists that came out longer than expected are to be run."""
    if not weighed():
        return
    number = routes.tiles.shape[3] if routes.counts is None else routes.counts.double().mean().item()
    if number > LONGER * tiles.routed_tiles:
        weigh(tiles.layout, number / tiles.keys.runs[1])


class Listed(NamedTuple):
    """A call as the engine runs it.

    Attributes:
        tensors: q, k and v, with the keys that a pattern pools of what it leaves out.
        key_mask: bool [B, keys], or None.
        problems: What to compute.
        heads: Who shares the lists of routed groups.
    """

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    key_mask: torch.Tensor | None
    problems: Problems
    heads: Heads = ALL_HEADS

    def work(self, scale: float, lse: bool = True) -> Work:
        """What the engine needs besides the tensors."""
        return Work(self.problems, scale, self.key_mask, lse, self.heads)


def listed_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, choice: torch.Tensor | None = None
) -> Listed:
    """The problems of a call; of a routed pattern those that q and k choose. Differentiable in q, k and v.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        call: The call.
        choice: The regions that routing has chosen for them already, or None.
    """
    pattern, layout, mask = call.pattern, call.layout, call.key_mask
    if not isinstance(pattern, RoutedPattern) or not _is_routed(pattern, layout):
        problems = _static_problems(pattern, layout, q.device, call.rpb is not None)
        return Listed((q, k, v), mask, problems)
    tiles = _routed_plan(pattern, layout)
    dense, fixed = _dense(pattern, layout, q.device)
    rest = merged = None
    if isinstance(pattern, DynamicPattern) and sharing_tiles(pattern, layout, SHARING) is not None:
        merged = merge(pattern.choose(q, k, layout, mask, call.scale), tiles, pattern.blocks(layout.grid))
        routes = merged.routes
    elif isinstance(pattern, DynamicPattern) and pattern.pools_rest:
        blocks = pattern.choose(q, k, layout, mask, call.scale)
        routes, pooled = pattern.spread(blocks, tiles), pattern.pooled(k, v, layout, mask)
        k, v, rest = pooled.k, pooled.v, pattern.rest_weights(pooled, blocks, tiles)
        more = torch.arange(layout.length, k.shape[1], device=q.device)
        fixed = more if fixed is None else torch.cat([fixed, more])
        # Pooled keys that are not seen have a weight that says so.
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, len(more)), value=True)
        rest = rest.flatten(0, 1)[:, None]
    elif choice is not None and isinstance(pattern, Routing):
        routes = pattern.routes_of(choice, tiles)
    else:
        routes = pattern.route(q, k, tiles, mask, call.scale)
    _weigh(routes, tiles)
    heads = Heads(routes.groups, q.shape[2], k.shape[2])
    in_order = isinstance(pattern, DynamicPattern) and pattern.blocks(layout.grid).in_order
    group = routed_group(tiles, routes.flat(), fixed, rest, merged, in_order)
    return Listed((q, k, v), mask, Problems((group, *dense)), heads)


@kept
def _dense(pattern: Pattern, layout: Layout, device: torch.device) -> tuple[tuple[Group, ...], torch.Tensor | None]:
    """The problem of the dense queries, and the dense and pooled key tokens."""
    keys = layout.keys
    own, of_keys = (
        np.concatenate([np.arange(side.prefix), np.arange(side.prefix + side.tokens, side.length)])
        for side in (layout, keys)
    )
    extra = pattern.extra_keys(keys.grid) if isinstance(pattern, PooledPattern) else 0
    fixed = np.concatenate([of_keys, np.arange(keys.length, keys.length + extra)])
    if isinstance(pattern, ListedPattern) and not pattern.dense_pairs:
        seen = np.arange(keys.prefix, keys.prefix + keys.tokens)
        groups = (listed_sequence(own, seen, device),) if len(own) else ()
    else:
        groups = (whole_sequence(own, keys.length, device),) if len(own) else ()
    return groups, torch.from_numpy(fixed).to(device) if len(fixed) else None


@kept
def _static_problems(pattern: Pattern, layout: Layout, device: torch.device, rpb: bool) -> Problems:
    """The problems of a pattern that does not look at q and k."""
    if pattern.covers(*layout.grids) and not rpb:
        return Problems((whole_sequence(np.arange(layout.length), layout.keys.length, device),))
    dense, fixed = _dense(pattern, layout, device)
    axes = _axes(pattern, layout, rpb)
    if axes is None:
        return Problems((*list_groups(_fine_plan(pattern, layout), device), *dense))
    sides = pattern.rpb_shape(layout.grid) if rpb and isinstance(pattern, BiasedPattern) else None
    windows = None if sides is None else tuple(side // 2 + 1 for side in sides)
    classes = [kinds.classes() for kinds in axes]
    return Problems((*box_groups(layout, classes, windows, fixed, device), *dense))


@kept
def _axes(pattern: Pattern, layout: Layout, rpb: bool) -> tuple[AxisKinds, ...] | None:
    """The tiles of each axis of a pattern that is one interval of keys per axis, and does not cover the grid."""
    spans = axis_spans(pattern, layout)
    if spans is None or (pattern.covers(*layout.grids) and not rpb):
        return None
    _, fixed = _dense(pattern, layout, torch.device("cpu"))
    return tuple(choose_axes(spans, 0 if fixed is None else len(fixed)))


def _fine_plan(pattern: Pattern, layout: Layout) -> TilePlan:
    """The pattern's own tiles, with smaller key tiles where many visits see only a part of a tile."""
    tiles = plan(pattern, layout)
    grid = tiles.pattern.tiled_layout(layout.keys).grid
    if tiles.full_share > MOSTLY_FULL:
        return tiles
    return plan(pattern, layout, (tiles.queries.shape, tiles.pattern.tile(grid, SMALL_KEY_TILE)))


def axis_spans(pattern: Pattern, layout: Layout) -> list[Spans] | None:
    """The keys of each query per axis, if the pattern is one interval of keys per axis."""
    return pattern.spans(*layout.grids) if isinstance(pattern, SpannedPattern) else None


backend = Tiles()
