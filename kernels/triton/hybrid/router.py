"""Routers on a GPU: lists by means, behind the learned maps of sla2, and how much of its mass is on them."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from visattn.kernels.triton.again import First, start_like
from visattn.kernels.triton.choosing.choose import (
    LARGEST,
    ROW_WARPS,
    Lists,
    Means,
    Others,
    Rule,
    listed_by_means,
    part_mean,
    part_tokens,
    rule_of,
    sizes,
)
from visattn.kernels.triton.hybrid.given import grid_mask, grids, narrow
from visattn.kernels.triton.start import launch_like
from visattn.layout import Layout
from visattn.operands import repeated
from visattn.patterns.choice.always import always_on, terms_of
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.listening import tell
from visattn.patterns.hybrid.sla import SLA
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.hybrid.vsa import VSA
from visattn.patterns.routes import Routes


class Pooled(NamedTuple):
    """Means of blocks [B, heads, blocks, D] in the dtype of the tensors.

    Attributes:
        query: Of queries, scaled.
        key: Of keys.
        value: Of values.
        count: Valid tokens of blocks of keys: int32 [B, blocks].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    count: torch.Tensor


class Odds(NamedTuple):
    """log(m / (1 - m)) of the mass m that a router of `sla2` gives to what is listed: float32 [B, H, rows].

    Attributes:
        exact: inf where everything is listed.
        finite: The same, 0 where they are infinite.
    """

    exact: torch.Tensor
    finite: torch.Tensor


class Routed(NamedTuple):
    """What the router says.

    Attributes:
        choice: The lists.
        grid: Grid tokens of q, k and v, channels contiguous.
        mask: Which of them take part, as `grid_mask` says it.
        means: Of `vsa`: scaled ones of queries, of keys and of values, in the dtype of q, and valid tokens of keys.
        others: Of `sla` and `sla2`: what linear attention has, [B * Hkv, query heads of one * rows, columns].
        odds: Of `sla2`.
        own: What is learned of `sla2`, in float32.
    """

    choice: Routes
    grid: list[torch.Tensor]
    mask: list[torch.Tensor]
    means: Pooled | None = None
    others: Others | None = None
    odds: Odds | None = None
    own: Mapping[str, torch.Tensor] | None = None


@triton.jit
def row_odds(
    scores, count_k, tiles, odds, finite, heads, first_head, some, rows, columns, most,
    COLUMNS: tl.constexpr, MOST: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The odds of the mass on what one query block of one head lists.

    Args:
        scores: float32 [B, some, rows, columns].
        count_k: Valid tokens of key blocks, which weigh: int32 [B, columns].
        tiles: What is listed: int32 [B, heads, rows, most], all entries of a list.
        odds: Result: float32 [B, heads, rows], inf where nothing else takes part.
        finite: The same, 0 where they are infinite.
        heads: Query heads.
        first_head: The first of `some` heads.
        some: Heads that the scores are of.
        rows: Query blocks.
        columns: Key blocks.
        most: Listed blocks.
        COLUMNS: A power of two that is at least `columns`.
        MOST: A power of two that is at least `most`.
        ALL: Whether everything is listed.
    """
    row, sample, own = tl.program_id(0), (tl.program_id(1) // some).to(tl.int64), tl.program_id(1) % some
    to = (sample * heads + first_head + own) * rows + row
    if ALL:
        tl.store(odds + to, float("inf"))
        tl.store(finite + to, 0.0)
    else:
        c, j = tl.arange(0, COLUMNS), tl.arange(0, MOST)
        line = scores + ((sample * some + own) * rows + row) * columns
        number = tl.load(count_k + sample * columns + c, mask=c < columns, other=0).to(tl.float32)
        x = tl.where(number > 0.0, tl.load(line + c, mask=c < columns, other=float("-inf")), float("-inf"))
        listed = tl.load(tiles + to * most + j, mask=j < most, other=0)
        weight = tl.load(count_k + sample * columns + listed, mask=j < most, other=0).to(tl.float32)
        own_x = tl.load(line + listed, mask=(j < most) & (weight > 0.0), other=float("-inf"))
        top = tl.max(x, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.sum(tl.exp(own_x - base) * weight, 0)
        # Blocks that are listed, and those without valid tokens, are no part of the rest.
        left = tl.sum((number > 0.0).to(tl.int32), 0) - tl.sum((weight > 0.0).to(tl.int32), 0)
        rest = tl.sum(tl.exp(x - base) * number, 0) - mass
        # A rest that rounding has lost is at least what float32 can tell from nothing.
        found = tl.log(mass) - tl.log(tl.maximum(rest, 1e-7 * mass))
        found = tl.where(left > 0, found, float("inf"))
        tl.store(odds + to, found)
        tl.store(finite + to, tl.where(tl.abs(found) == float("inf"), 0.0, found))


def routed(
    pattern: SLA | SLA2 | VSA,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    scale: float,
    parameters: Mapping[str, torch.Tensor],
) -> Routed | None:
    """What the router lists, and what else it has found by that; None where no kernel lists.

    Arguments as of `HybridPattern.join`; an `sla` has lists for its second branch.
    """
    blocks = pattern.blocks(layout.grid)
    rules = _rules(pattern, blocks)
    if rules is None or not q.numel():
        return None
    grid, mask = grids((q, k, v), layout), grid_mask(key_mask, layout)
    with torch.no_grad():
        if isinstance(pattern, VSA):
            tiles, *means = pooled(pattern, grid, mask, blocks, scale, rules[0])
            found = Routed(Routes(tiles), grid, mask, Pooled(*means))
        else:
            own = pattern.own(parameters, q, layout.grid) if isinstance(pattern, SLA2) and pattern.learnable else {}
            found = _listed(pattern, grid, mask, blocks, scale, rules, own)
    tell(found.choice, blocks)
    return found


@lru_cache(maxsize=256)
def _rules(pattern: SLA | SLA2 | VSA, blocks: Blocks) -> tuple[Rule, Rule | None] | None:
    """How rows list, and of `sla` how they list marginal blocks too; None where no kernel does."""
    rule = rule_of(pattern.front, blocks)
    wider = rule_of(pattern.wider(blocks), blocks) if isinstance(pattern, SLA) else None
    if rule is None or (isinstance(pattern, SLA) and wider is None) or blocks.columns > LARGEST:
        return None
    return rule, wider


def pooled(
    pattern: VSA,
    given: list[torch.Tensor],
    mask: list[torch.Tensor],
    blocks: Blocks,
    scale: float,
    rule: Rule | None,
) -> Sequence[torch.Tensor]:
    """The lists by a rule, if there is one, then what `Pooled` has.

    Args:
        pattern: The pattern.
        given: Grid queries, keys and values, channels contiguous.
        mask: Which tokens take part, as `grid_mask` says it.
        blocks: The blocks.
        scale: Factor on the means of queries.
        rule: How rows list, None where somebody else does.
    """

    def first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None = None) -> First:
        results, inside, found = [], [], []
        for x, side, factor in zip((q, k, v), (*blocks.sides, blocks.sides[1]), (scale, 1.0, 1.0), strict=True):
            tokens = part_tokens(*side, 1, x.device)
            # In the dtype of q, for which torch has the faster kernels.
            own = None if x.dtype == torch.float32 else x.new_empty((len(x), x.shape[2], len(tokens), x.shape[3]))
            found.append(part_mean(x, tokens, valid, factor, own))
            results.append(found[-1].mean if own is None else own)
            inside += [] if own is None else [found[-1].mean]
        query, key, value = found
        results, inside = [*results, key.count], [*inside, query.count, value.count]
        if rule is None:
            return First(results, inside)
        made = listed_by_means(rule, (1, 1), query, key, blocks, _forced(pattern, blocks, q), valid is not None)
        return First([made.tiles, *results], [*inside, made.counts, made.scores])

    return start_like((pooled, pattern, blocks, scale, rule, *sizes()), [*given, *mask], first)


def _listed(
    pattern: SLA | SLA2,
    grid: list[torch.Tensor],
    mask: list[torch.Tensor],
    blocks: Blocks,
    scale: float,
    rules: tuple[Rule, Rule | None],
    own: Mapping[str, torch.Tensor],
) -> Routed:
    """What rows list of grid queries and keys, and what they leave to linear attention."""
    given, masked = [*grid[:2], *mask], bool(mask)
    q, k = grid[:2]
    dtype, kv_heads = narrow(q.dtype), k.shape[2]
    about = pattern, blocks, scale, masked, dtype, kv_heads, *sizes()

    def means(q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None = None) -> list[Means]:
        sides = zip((q, k), blocks.sides, (scale, 1.0), strict=True)
        return [part_mean(x, part_tokens(*side, 1, x.device), valid, factor) for x, side, factor in sides]

    def lists(query: Means, key: Means) -> First:
        return _lists(pattern, query, key, blocks, rules, masked, dtype, kv_heads)

    def whole(*given: torch.Tensor) -> First:
        query, key = means(*given)
        made = lists(query, key)
        return First(made.results, [*made.inside, *query, *key])

    if "route_query" in own:
        query, query_count, key, key_count = start_like(
            (_listed, "means", about), given, lambda *given: First([t for side in means(*given) for t in side])
        )
        wide = repeated(key, query.shape[1], 1)
        routed = _mapped(query, own["route_query"]), query_count, _mapped(wide, own["route_key"]), key_count
        found = start_like((_listed, "lists", about), routed, lambda q, m, k, n: lists(Means(q, m), Means(k, n)))
    else:
        found = start_like((_listed, "both", about), given, whole)
    tiles, wide, *rest = found
    # Where states are float32 there is one tensor of both.
    same = dtype == torch.float32
    others, odds = Others(wide if same else rest[0], wide), rest if same else rest[1:]
    return Routed(Routes(tiles), grid, mask, None, others, Odds(*odds) if odds else None, own)


def _mapped(mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Means [B, H, blocks, D] behind the map [H, D, D] of each head."""
    if len(mean) > 1:
        return mean @ weight
    # The same product, by fewer operators.
    return torch.bmm(mean.squeeze(0), weight).unsqueeze(0)


def _forced(pattern: SLA | SLA2 | VSA, blocks: Blocks, x: torch.Tensor) -> torch.Tensor | None:
    """What is listed whatever it scores."""
    return always_on(terms_of(pattern.always), blocks, x.device)


def _lists(
    pattern: SLA | SLA2,
    query: Means,
    key: Means,
    blocks: Blocks,
    rules: tuple[Rule, Rule | None],
    masked: bool,
    dtype: torch.dtype,
    kv_heads: int,
) -> First:
    """Lists, what is not listed, in float32 and in the dtype of states if that is another, and of `sla2` the odds."""
    (batch, heads), (rule, wider), device = query.mean.shape[:2], rules, query.mean.device
    shape = batch * kv_heads, heads // kv_heads * blocks.rows, blocks.columns
    wide = torch.empty(shape, dtype=torch.float32, device=device)
    own = [wide] if dtype == torch.float32 else [wide, torch.empty(shape, dtype=dtype, device=device)]
    shape, mixes = (batch, heads, blocks.rows), isinstance(pattern, SLA2)
    odds = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2)] if mixes else []
    width = 1 << (blocks.columns - 1).bit_length()
    warps = next(n for columns, n in ROW_WARPS.items() if width <= columns)

    def weigh(made: Lists, some: dict[str, int]) -> None:
        given = {
            "scores": made.scores, "count_k": key.count, "tiles": made.tiles,
            "odds": odds[0], "finite": odds[1], **some,
            "most": rule.most, "COLUMNS": width, "MOST": 1 << (rule.most - 1).bit_length(),
            "ALL": rule.most >= blocks.columns,
        }  # fmt: skip
        launch_like(row_odds, (blocks.rows, batch * some["some"]), given, warps, None)

    then = weigh if odds else None
    forced, others = _forced(pattern, blocks, query.mean), Others(own[-1], wide, wider)
    made = listed_by_means(rule, (1, 1), query, key, blocks, forced, masked, then, others)
    return First([made.tiles, *own, *odds], [made.counts, made.scores])
