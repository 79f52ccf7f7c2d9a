"""The router of sla2 on a GPU: lists by means behind learned maps, and how much of the router's mass is on them."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from visattn.kernels.triton.choosing.choose import (
    LARGEST,
    ROW_WARPS,
    Lists,
    Means,
    listed_by_means,
    part_mean,
    part_tokens,
    rule_of,
)
from visattn.kernels.triton.start import launch_like, on
from visattn.layout import Layout
from visattn.patterns.choice.always import always_on, terms_of
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.listening import tell
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.routes import Routes


class Routed(NamedTuple):
    """What the router says.

    Attributes:
        choice: The lists.
        odds: log(m / (1 - m)) of its mass m on what is listed: float32 [B, H, rows], inf where all is.
    """

    choice: Routes
    odds: torch.Tensor


@triton.jit
def row_odds(
    scores, count_k, tiles, odds, heads, first_head, some, rows, columns, most,
    COLUMNS: tl.constexpr, MOST: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The odds of the mass on what one query block of one head lists.

    Args:
        scores: float32 [B, some, rows, columns].
        count_k: Valid tokens of key blocks, which weigh: int32 [B, columns].
        tiles: What is listed: int32 [B, heads, rows, most], all entries of a list.
        odds: Result: float32 [B, heads, rows].
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
        tl.store(odds + to, tl.where(left > 0, found, float("inf")))


def routed(
    pattern: SLA2,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    scale: float,
    parameters: Mapping[str, torch.Tensor],
) -> Routed | None:
    """What the router lists, and the odds of its mass on that; None where no kernel does.

    Arguments as of `HybridPattern.choose`.
    """
    at, blocks = inner(layout), pattern.blocks(layout.grid)
    rule = rule_of(pattern.front, blocks)
    if rule is None or blocks.columns > LARGEST or not q.numel():
        return None
    grid = [x if x.stride(3) == 1 else x.contiguous() for x in (q[:, at], k[:, at])]
    mask = None if key_mask is None else key_mask[:, at].contiguous().view(torch.uint8)
    with on(q.device), torch.no_grad():
        query, key = (
            part_mean(x, part_tokens(*side, 1, q.device), mask, factor)
            for x, side, factor in zip(grid, blocks.sides, (scale, 1.0), strict=True)
        )
        if pattern.router == "learned":
            own, each = pattern.own(parameters, q, layout.grid), q.shape[2] // k.shape[2]
            wide = key.mean if each == 1 else key.mean.repeat_interleave(each, 1)
            query = Means(query.mean @ own["route_query"], query.count)
            key = Means(wide @ own["route_key"], key.count)
        odds = torch.empty(query.mean.shape[:3], dtype=torch.float32, device=q.device)
        width = 1 << (blocks.columns - 1).bit_length()
        warps = next(n for columns, n in ROW_WARPS.items() if width <= columns)

        def weigh(made: Lists, some: dict[str, int]) -> None:
            given = {
                "scores": made.scores, "count_k": key.count, "tiles": made.tiles, "odds": odds, **some,
                "most": rule.most, "COLUMNS": width, "MOST": 1 << (rule.most - 1).bit_length(),
                "ALL": rule.most >= blocks.columns,
            }  # fmt: skip
            launch_like(row_odds, (blocks.rows, len(q) * some["some"]), given, warps, None)

        forced = always_on(terms_of(pattern.always), blocks, q.device)
        made = listed_by_means(rule, (1, 1), query, key, blocks, forced, mask is not None, weigh)
    choice = Routes(made.tiles, None)
    tell(choice, blocks)
    return Routed(choice, odds)
