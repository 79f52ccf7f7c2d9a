"""Linear attention of second branches: states of keys, and their joining to the softmax branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.kernels.triton.again import First, start_like
from visattn.kernels.triton.choosing.choose import Others, part_tokens
from visattn.kernels.triton.hybrid.given import narrow
from visattn.kernels.triton.hybrid.join import join_states
from visattn.kernels.triton.hybrid.sizes import ROWS, precision, sizes, strides, warps
from visattn.kernels.triton.hybrid.states import group_states
from visattn.kernels.triton.linear.attention import splitting
from visattn.kernels.triton.start import launch_like
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.tail import LEAST

# Tokens of a step of kernels that hold a large state too: two programs or more have room on a multiprocessor at the
# same time.
BESIDE_STATE = 32
# Steps of a program that reads the one state of a head.
STEPS = 16
# Steps whose tokens are on their way at once: of states, by the bytes of a number, and of their reading, where those of
# float16 are as large as those of float32.
STATES_STAGES, JOIN_STAGES = {2: 3, 4: 2}, {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}
# Bytes of the states that exist at a time.
SLICE = 2**29


def _rows_beside(sizes: dict[str, Any], most: int) -> dict[str, int]:
    """Tokens of a step of a kernel that holds a state of these sizes: where it is large, no more than `most`."""
    large = max(sizes["BLOCK_F"], sizes["BLOCK_D"]) > 64
    return {"ROWS": min(sizes["ROWS"], most) if large else sizes["ROWS"]}


def states_arguments(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: torch.Tensor | None,
    groups: tuple[int, int],
    valid: torch.Tensor | None,
    feature: str,
) -> dict[str, Any]:
    """Arguments of `group_states`, and its results.

    Args:
        k: Grid keys [B, tokens, heads, F].
        v: Grid values [B, tokens, heads, D].
        tokens: Tokens of each group, None for runs.
        groups: How many groups, and tokens of each at most.
        valid: uint8 [B, tokens], or None.
        feature: Name of the feature map.
    """
    batch, length, heads, features = k.shape
    number, slots = groups
    dtype = torch.float32 if tokens is None else narrow(v.dtype)
    own = sizes(features, v.shape[3], v.dtype)
    shape, sums = (batch, heads, number, features, v.shape[3]), (batch, heads, number, features)
    if tokens is not None:
        # As products with them take it.
        shape, sums = (batch * heads, number, features * v.shape[3]), (batch * heads, number, features)
    return {
        "k": k, "v": v, "tokens": k if tokens is None else tokens,
        "valid": k if valid is None else valid,
        "states": k.new_empty(shape, dtype=dtype), "sums": k.new_empty(sums, dtype=torch.float32),
        **strides("k", k), **strides("v", v), "valid_batch": length,
        "heads": heads, "groups": number, "slots": slots, "length": length,
        **own, **_rows_beside(own, BESIDE_STATE),
        "FEATURE": feature, "RUNS": tokens is None, "VALID": valid is not None,
    }  # fmt: skip


def _states(
    k: torch.Tensor, v: torch.Tensor, mask: list[torch.Tensor], blocks: Blocks | None, feature: str
) -> Sequence[torch.Tensor]:
    """States of groups of keys and sums of features, of runs [B, heads, groups, F, D] and [B, heads, groups, F].

    Of blocks, [B * heads, blocks, F * D] and [B * heads, blocks, F].

    Args:
        k: Grid keys.
        v: Grid values.
        mask: Which tokens take part, as `grid_mask` says it.
        blocks: Blocks of keys as groups, None for runs.
        feature: Name of the feature map.
    """

    def first(k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None = None) -> First:
        if blocks is None:
            slots, number = splitting(k.shape[1], len(k) * k.shape[2], ROWS, k.device)
            given = states_arguments(k, v, None, (number, slots), valid, feature)
        else:
            columns = part_tokens(*blocks.sides[1], 1, k.device)
            number = len(columns)
            given = states_arguments(k, v, columns, (number, columns.shape[1]), valid, feature)
        grid = number, k.shape[2], len(k)
        launch_like(group_states, grid, given, warps(given), STATES_STAGES[k.element_size()])
        return First((given["states"], given["sums"]))

    return start_like((_states, blocks, feature, precision(v.dtype)), [k, v, *mask], first)


def join_arguments(
    q: torch.Tensor,
    out: torch.Tensor,
    state: torch.Tensor,
    sums: torch.Tensor,
    share: torch.Tensor | None,
    bias: torch.Tensor,
    tokens: torch.Tensor | None,
    feature: str,
    odds: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of `join_states`.

    Args:
        q: Grid queries [B, tokens, H, F].
        out: The softmax branch [B, tokens, H, D].
        state: Of each group and head of q with `tokens`, else [B, key heads, 1, F, D].
        sums: Alike, without D.
        share: [B, H, groups], or None to add.
        bias: [D] where there is no share.
        tokens: Queries of each group; None for runs of all.
        feature: Name of the feature map.
        odds: Where these are infinite the share is 1: like that, or None.
    """
    own, length = sizes(q.shape[3], out.shape[3], q.dtype), q.shape[1]
    wide = q.dtype == torch.float32
    own |= _rows_beside(own, BESIDE_STATE // 2 if wide else BESIDE_STATE)
    slots = STEPS * own["ROWS"] if tokens is None else tokens.shape[1]
    groups = -(-length // slots) if tokens is None else len(tokens)
    return {
        "q": q, "state": state, "sums": sums, "bias": bias, "share": bias if share is None else share,
        "odds": bias if odds is None else odds,
        "out": out, "tokens": q if tokens is None else tokens, **strides("q", q), **strides("out", out),
        "heads": q.shape[2], "group": q.shape[2] // state.shape[1] if tokens is None else 1,
        "groups": groups, "states": 1 if tokens is None else groups,
        "slots": slots, "length": length, "least": LEAST,
        **own, "FEATURE": feature, "RUNS": tokens is None, "SHARE": share is not None,
        "ODDS": odds is not None, "WIDE": wide, "STAGES": JOIN_STAGES[q.dtype],
    }  # fmt: skip


def join_warps(given: dict[str, Any]) -> int:
    """Warps of a program of `join_states`: with few of them more programs have room."""
    return warps(given) if given["WIDE"] else 4


def _start_join(given: Sequence[torch.Tensor], blocks: Blocks | None, feature: str, bias: bool) -> None:
    """Join states to outputs.

    Args:
        given: Grid queries, outputs, states, sums, then the bias, or shares and the odds if they decide anything.
        blocks: Blocks of queries as groups, None for runs of all.
        feature: Name of the feature map.
        bias: Whether there is a bias.
    """

    def first(
        q: torch.Tensor, out: torch.Tensor, state: torch.Tensor, sums: torch.Tensor, last: torch.Tensor, *odds: Any
    ) -> First:
        tokens = None if blocks is None else part_tokens(*blocks.sides[0], 1, q.device)
        own = join_arguments(q, out, state, sums, None if bias else last, last, tokens, feature, *odds)
        launch_like(join_states, (own["groups"], q.shape[2], len(q)), own, join_warps(own), own["STAGES"])
        return First(())

    start_like((_start_join, blocks, feature, bias, precision(given[0].dtype)), given, first)


def add_all(grid: list[torch.Tensor], mask: list[torch.Tensor], feature: str, own: Mapping[str, torch.Tensor]) -> None:
    """SLA with sums over all keys: the map is of the state, which is small, instead of the outputs."""
    q, k, v, out = grid
    states, sums = _states(k, v, mask, None, feature)
    state = states.sum(2, keepdim=True) @ own["weight"].T
    state = state.to(narrow(v.dtype)).contiguous()
    _start_join((q, out, state, sums.sum(2, keepdim=True), own["bias"].contiguous()), None, feature, True)


def join_blocks(
    grid: list[torch.Tensor],
    mask: list[torch.Tensor],
    others: Others,
    last: list[torch.Tensor],
    blocks: Blocks,
    feature: str,
    bias: bool = False,
) -> None:
    """Linear attention of query blocks over the others, some heads at a time.

    Args:
        grid: Grid queries, keys, values and outputs.
        mask: Which tokens take part.
        others: Key blocks of each query block, as `Routed.others` has them.
        last: How much stays of the outputs, float32 [B, H, rows], and odds: where these are infinite all stays. With
            `bias` that alone, float32 [D].
        blocks: The blocks.
        feature: Name of the feature map.
        bias: Whether to add to the outputs.
    """
    q, k, v, out = grid
    (batch, _, heads, features), kv_heads = q.shape, k.shape[2]
    each, rows, columns = heads // kv_heads, blocks.rows, blocks.columns
    size = batch * (columns + each * rows) * features * v.shape[3] * v.element_size()
    step = max(1, SLICE // size)
    if step >= kv_heads:
        found = zip(others[:2], _states(k, v, mask, blocks, feature), strict=True)
        # All key heads are one product of matrices for each.
        joined = (torch.bmm(of, x) for of, x in found)
        _start_join([q, out, *joined, *last], blocks, feature, bias)
        return
    weights = [x.view(batch, kv_heads, each * rows, columns) for x in others[:2]]
    for first in range(0, kv_heads, step):
        keys = slice(first, min(kv_heads, first + step))
        own = slice(each * first, each * keys.stop)
        found = zip(weights, _states(k[:, :, keys], v[:, :, keys], mask, blocks, feature), strict=True)
        joined = (of[:, keys] @ x.unflatten(0, (batch, -1)) for of, x in found)
        some = last if bias else [x[:, own].contiguous() for x in last]
        _start_join([q[:, :, own], out[:, :, own], *joined, *some], blocks, feature, bias)
