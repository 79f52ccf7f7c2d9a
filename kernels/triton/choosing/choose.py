"""Choosing key blocks on the device: means of q and k, scores of some heads at a time, a list for each row.

Work and results depend on shapes alone, nothing waits for the device, and the same tensors give the same lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.again import First, start_like
from visattn.kernels.triton.choosing.means import part_means
from visattn.kernels.triton.choosing.scores import pair_scores
from visattn.kernels.triton.choosing.select import RULE_ABOVE, RULE_MASS, RULE_NUMBER, select
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.start import aligned, launch_like, on
from visattn.operands import in_rows
from visattn.patterns import Above, DynamicPattern, Routes, TopK, TopP
from visattn.patterns.choice.always import always_on, terms_of
from visattn.patterns.choice.blocks import Blocks, within
from visattn.patterns.choice.causal import reach_of, reach_on
from visattn.patterns.choice.picks import bar_of
from visattn.patterns.choice.pooling import part_ends
from visattn.patterns.choice.scores import Score

# Key blocks of a row that one program holds.
LARGEST = 8192
# Scores that exist at a time: 256 MB.
SCORES = 2**26
# Numbers of a step of the means, and parts and channels of a step of the scores.
MEANS, PARTS, CHANNELS = 8192, 128, 32
# Warps of a program for means, for scores (twice as many where blocks have parts, whose tiles are larger), and for rows
# of up to so many blocks; a row of one warp needs no barriers.
MEAN_WARPS, SCORE_WARPS, ROW_WARPS = 1, 4, {1024: 1, 4096: 4, LARGEST: 8}


class Rule(NamedTuple):
    """How a row is picked, in the terms of `select`."""

    kind: int
    most: int
    number: int = 0
    least: int = 0
    share: float = 0.0
    cover: bool = False


def rule_of(pattern: DynamicPattern, blocks: Blocks) -> Rule | None:
    """The rule of a pattern, None where no kernel has it."""
    if pattern.per != "row" or pattern.share != 1 or pattern.alike is not None:
        return None
    if any(blocks.causal) and reach_of(blocks) is None:
        return None
    most = pattern.most_listed(blocks)
    # Exactly these: what derives from them may pick otherwise.
    if type(pattern) is TopK:
        return Rule(RULE_NUMBER.value, most, number=pattern.number(blocks))
    if (
        type(pattern) is TopP
        and pattern.of == "softmax"
        and not pattern.counted
        and pattern.least_listed(blocks) < blocks.columns
    ):
        cover, least = pattern.rule == "cover", pattern.least_listed(blocks)
        return Rule(RULE_MASS.value, most, least=least, share=bar_of(pattern.p), cover=cover)
    if type(pattern) is Above and pattern.bar == "exact":
        return Rule(RULE_ABOVE.value, most, share=pattern.tau)
    return None


def parts_of(score: Score) -> tuple[int, int] | None:
    """Parts of a query and of a key block, None for scores that no kernel has."""
    parts = score.query_parts, score.key_parts
    fits = score.name in ("mean", "parts") and all(n & (n - 1) == 0 and n <= PARTS // 4 for n in parts)
    return parts if fits else None


@kept
def part_tokens(grid: tuple[int, ...], box: tuple[int, ...], parts: int, device: torch.device) -> torch.Tensor:
    """The grid tokens of each part of each block, -1 behind a border: int32 [blocks * parts, tokens of a part]."""
    whole, box = box, within(grid, box)
    index = np.full([-(-n // side) * side for n, side in zip(grid, box, strict=True)], -1, np.int32)
    index[tuple(slice(n) for n in grid)] = np.arange(math.prod(grid)).reshape(grid)
    dims = len(grid)
    cut = index.reshape([m for n, side in zip(index.shape, box, strict=True) for m in (n // side, side)])
    cut = cut.transpose([*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)])
    if whole == box or parts == 1:
        return torch.from_numpy(np.ascontiguousarray(cut.reshape(-1, math.prod(box) // parts))).to(device)
    # What lies behind the end of the grid is no slot, but counts where a block is cut in parts.
    ends = (0, *part_ends(grid, whole, parts))
    table = np.full((math.prod(cut.shape[:dims]), parts, max(np.diff(ends))), -1, np.int32)
    for part, (start, stop) in enumerate(pairwise(ends)):
        table[:, part, : stop - start] = cut.reshape(len(table), -1)[:, start:stop]
    return torch.from_numpy(table.reshape(-1, table.shape[2])).to(device)


class Means(NamedTuple):
    """Means of one side.

    Attributes:
        mean: float32 [B, heads, parts of all blocks, D].
        count: Valid tokens of each part: int32 [B, parts of all blocks].
    """

    mean: torch.Tensor
    count: torch.Tensor


def part_mean(
    x: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    rounded: torch.Tensor | None = None,
) -> Means:
    """Means of the parts of grid tokens [B, tokens, heads, D], times a factor; `rounded` gets them in its dtype."""
    batch, _, heads, head_dim = x.shape
    parts, slots = tokens.shape
    mean = torch.empty((batch, heads, parts, head_dim), dtype=torch.float32, device=x.device)
    count = torch.empty((batch, parts), dtype=torch.int32, device=x.device)
    width = block_dim(head_dim)
    given = {
        "x": x, "out": mean, "rounded": mean if rounded is None else rounded, "counts": count,
        "tokens": tokens, "valid": tokens if valid is None else valid,
        "x_batch": x.stride(0), "x_token": x.stride(1), "x_head": x.stride(2),
        "valid_batch": 0 if valid is None else valid.stride(0),
        "scale": scale, "heads": heads, "parts": parts, "slots": slots,
        "HEAD_DIM": head_dim, "BLOCK_DIM": width, "VALID": valid is not None,
        "SLOTS": min(1 << (slots - 1).bit_length(), MEANS // width), "ROUNDED": rounded is not None,
    }  # fmt: skip
    launch_like(part_means, (parts, heads, batch), given, MEAN_WARPS, None)
    return Means(mean, count)


def mask_bytes(valid: torch.Tensor) -> torch.Tensor:
    """Which tokens take part, as kernels read it: uint8 [B, tokens], contiguous, where kept launches may read it."""
    rows = valid.contiguous()
    # A slice of a mask of one sample is contiguous, and begins anywhere.
    return (rows if aligned((rows,)) else rows.clone()).view(torch.uint8)


def block_means(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None) -> Means:
    """Means of blocks of grid tokens [B, tokens, heads, D], of those that `valid`, bool [B, tokens], has."""
    x = in_rows(x)
    bytes_of_mask = None if valid is None else mask_bytes(valid)
    with on(x.device):
        return part_mean(x, part_tokens(grid, box, 1, x.device), bytes_of_mask, 1.0)


def chosen(
    pattern: DynamicPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    scale: float,
) -> Routes | None:
    """What a pattern chooses, None where no kernel does.

    Args:
        pattern: The pattern.
        q: Grid queries [B, tokens, H, D] on a device that Triton runs on.
        k: Grid keys [B, tokens, Hkv, D].
        blocks: Its blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        scale: Factor on the logits.

    Returns:
        int32 lists [B, H, query blocks, n] and their counts, None where all n count.
    """
    if not q.numel() or not k.numel():
        return None
    how = _ways(pattern, blocks)
    if how is None:
        return None
    rule, parts, counted = how
    given = [in_rows(x) for x in (q, k)]
    if valid is not None:
        given.append(mask_bytes(valid))

    def first(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None = None) -> First:
        forced = always_on(terms_of(pattern.always), blocks, q.device)
        sides = zip((q, k), (blocks.queries, blocks.keys), parts, (scale, 1.0), strict=True)
        query, key = (
            part_mean(x, part_tokens(blocks.grid, box, n, x.device), mask, factor) for x, box, n, factor in sides
        )
        made = listed_by_means(rule, parts, query, key, blocks, forced, mask is not None)
        return First((made.tiles, made.counts), (made.scores, *query, *key))

    tiles, counts = start_like((chosen, pattern, blocks, scale, *sizes()), given, first)
    return Routes(tiles, counts if counted else None)


@lru_cache(maxsize=256)
def _ways(pattern: DynamicPattern, blocks: Blocks) -> tuple[Rule, tuple[int, int], bool] | None:
    """Rule and parts of a pattern, and whether its rows list different numbers; None where no kernel chooses."""
    rule, parts = rule_of(pattern, blocks), parts_of(Score.of(pattern.score))
    if rule is None or parts is None or blocks.columns > LARGEST:
        return None
    return rule, parts, pattern.least_listed(blocks) != rule.most or any(blocks.causal)


def sizes() -> tuple[object, ...]:
    """What decides how kernels that choose are launched, whatever they choose."""
    return SCORES, MEAN_WARPS, SCORE_WARPS, tuple(ROW_WARPS.items())


class Others(NamedTuple):
    """How much each block counts that a row does not list: 1 or 0.

    Attributes:
        narrow: In the dtype of states: [B, heads, rows, columns] in this order, of whatever shape.
        wide: float32; the same tensor where that is the dtype of states.
        within: A rule that lists more than the lists' own: of the others, only what it lists is 1. None for all.
    """

    narrow: torch.Tensor
    wide: torch.Tensor
    within: Rule | None = None


class Lists(NamedTuple):
    """What rows list.

    Attributes:
        tiles: int32 [B, heads, rows, most].
        counts: int32 [B, heads, rows].
        scores: Of the heads that came last: float32 [B, some, rows, columns].
    """

    tiles: torch.Tensor
    counts: torch.Tensor
    scores: torch.Tensor


def listed_by_means(
    rule: Rule,
    parts: tuple[int, int],
    query: Means,
    key: Means,
    blocks: Blocks,
    forced: torch.Tensor | None,
    masked: bool,
    then: Callable[[Lists, dict[str, int]], None] | None = None,
    others: Others | None = None,
) -> Lists:
    """What rows list by the products of means, scores of some heads at a time.

    Args:
        rule: How they pick.
        parts: Parts of a query and of a key block.
        query: Scaled means of queries.
        key: Means of keys.
        blocks: The blocks.
        forced: What is listed whatever its score: bool [rows, columns], or None.
        masked: Whether some tokens take no part.
        then: Called for each slice of heads while their scores are there, with the sizes that kernels take.
        others: Gets what is not listed.
    """
    (batch, heads), (rows, columns), device = query.mean.shape[:2], (blocks.rows, blocks.columns), query.mean.device
    each = max(1, min(heads, SCORES // max(1, batch * rows * columns)))
    made = Lists(
        torch.empty((batch, heads, rows, rule.most), dtype=torch.int32, device=device),
        torch.empty((batch, heads, rows), dtype=torch.int32, device=device),
        torch.empty((batch, each, rows, columns), dtype=torch.float32, device=device),
    )
    reach = reach_on(blocks, device) if any(blocks.causal) else None
    for first in range(0, heads, each):
        some = {"heads": heads, "first_head": first, "some": min(each, heads - first)}
        some |= {"rows": rows, "columns": columns}
        _score(query, key, made.scores, parts, some)
        read = made.scores, forced, reach, query, key
        _select(*read, made.tiles, made.counts, parts, masked, rule, some, others, False)
        if others is not None and others.within is not None:
            _select(*read, made.tiles, made.counts, parts, masked, others.within, some, others, True)
        if then is not None:
            then(made, some)
    return made


def _score(query: Means, key: Means, scores: torch.Tensor, parts: tuple[int, int], some: dict[str, int]) -> None:
    """Scores of some heads."""
    batch, kv_heads, key_parts, head_dim = key.mean.shape
    pooled = parts != (1, 1)
    rows = PARTS if pooled else PARTS // 2
    given = {
        "mean_q": query.mean, "mean_k": key.mean, "count_q": query.count, "count_k": key.count, "scores": scores,
        **some, "group": some["heads"] // kv_heads,
        "HEAD_DIM": head_dim, "ROWS": rows, "COLUMNS": PARTS, "CHANNELS": min(CHANNELS, block_dim(head_dim)),
        "QUERY_PARTS": parts[0], "KEY_PARTS": parts[1],
    }  # fmt: skip
    grid = -(-query.mean.shape[2] // rows), -(-key_parts // PARTS), batch * some["some"]
    launch_like(pair_scores, grid, given, 2 * SCORE_WARPS if pooled else SCORE_WARPS, 2)


def _select(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    reach: torch.Tensor | None,
    query: Means,
    key: Means,
    tiles: torch.Tensor,
    counts: torch.Tensor,
    parts: tuple[int, int],
    masked: bool,
    rule: Rule,
    some: dict[str, int],
    others: Others | None,
    within: bool,
) -> None:
    """Lists of some heads, or what of the others is `within` those of another rule."""
    width = 1 << (some["columns"] - 1).bit_length()
    given: dict[str, Any] = {
        "scores": scores, "forced": query.count if forced is None else forced.view(torch.uint8),
        "reach": query.count if reach is None else reach,
        "count_q": query.count, "count_k": key.count, "tiles": tiles, "counts": counts,
        "others": counts if others is None else others.narrow,
        "wide_others": counts if others is None else others.wide,
        **some, "query_parts": parts[0], "key_parts": parts[1],
        "number": rule.number, "least": rule.least, "most": rule.most, "share": float(rule.share),
        "RULE": rule.kind, "COVER": rule.cover, "FORCED": forced is not None, "VALID": masked,
        "CAUSAL": reach is not None,
        "COLUMNS": width, "MOST": 1 << (rule.most - 1).bit_length(), "LEAST": rule.least > 0,
        "LIMITED": rule.most < some["columns"],
        "LISTS": not within, "OTHERS": others is not None, "WITHIN": within,
    }  # fmt: skip
    warps = next(n for columns, n in ROW_WARPS.items() if width <= columns)
    launch_like(select, (some["rows"], len(tiles) * some["some"]), given, warps, None)
