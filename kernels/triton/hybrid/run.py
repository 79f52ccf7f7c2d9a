"""The second branch of each hybrid pattern by kernels: without gradients, joined to the softmax branch in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from visattn.kernels.fused import fused
from visattn.kernels.triton.choosing.choose import Means, block_means, part_tokens
from visattn.kernels.triton.hybrid.gated import add_gated
from visattn.kernels.triton.hybrid.join import join_states
from visattn.kernels.triton.hybrid.router import Routed
from visattn.kernels.triton.hybrid.states import group_states
from visattn.kernels.triton.linear.attention import power, splitting
from visattn.kernels.triton.start import launch_like, on
from visattn.layout import Layout
from visattn.patterns.choice.blocks import Blocks, inner
from visattn.patterns.choice.tail import LEAST
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.sla import SLA
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.hybrid.vsa import VSA
from visattn.patterns.routes import Routes

# Largest number of channels: all features of a token are in the registers of one program.
LARGEST = 128
# Tokens of a step; of kernels that hold a state too where it is large, so that two programs or more have room on a
# multiprocessor at the same time.
ROWS, BESIDE_STATE = 64, 32
# Steps of a program that reads the one state of a head.
STEPS = 16
# Steps whose tokens are on their way at once: of states, by the bytes of a number, and of their reading, where those of
# float16 are as large as those of float32.
STATES_STAGES, JOIN_STAGES = {2: 3, 4: 2}, {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}
# Bytes of the states that exist at a time.
SLICE = 2**29


def runs(pattern: HybridPattern, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether kernels have the second branch of a pattern, for tensors like these."""
    known = type(pattern) in (SLA, SLA2, VSA) and not getattr(pattern, "soft", 0)
    return known and dtype in (torch.float16, torch.bfloat16, torch.float32) and head_dim <= LARGEST


def join(
    pattern: HybridPattern,
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    scale: float,
    choice: Routes | None,
    parameters: Mapping[str, torch.Tensor],
    routed: Routed | None = None,
) -> None:
    """Join the second branch to `out`, which has the first.

    Args:
        pattern: One that `runs` says yes to.
        out: [B, S, H, D], whose grid rows are overwritten.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values, alike.
        layout: The tokens.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits.
        choice: The lists, where the pattern needs them.
        parameters: What is learned.
        routed: What a router has found, where the lists came with it.
    """
    at = inner(layout)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    grid = [x[:, at] for x in (q, k, v, out)]
    valid = None if key_mask is None else key_mask[:, at].contiguous()
    if not parameters and not isinstance(pattern, SLA2):
        return
    own = pattern.own(parameters, q, layout.grid)
    with on(q.device), torch.no_grad():
        if isinstance(pattern, VSA):
            blocks = pattern.blocks(layout.grid)
            _add_coarse(grid, blocks, valid, _means(grid, blocks, valid, scale, routed), own)
        elif choice is None:
            assert isinstance(pattern, SLA)
            _add_all(grid, valid, pattern.feature, own)
        elif isinstance(pattern, SLA):
            of = pattern.marginal_blocks(q, k, layout, key_mask, scale, choice)
            grid[2] = grid[2] @ own["weight"].T.to(v.dtype)
            _join_blocks(grid, of, None, own["bias"], pattern.blocks(layout.grid), valid, pattern.feature)
        else:
            assert isinstance(pattern, SLA2)
            blocks = pattern.blocks(layout.grid)
            listed = choice.mask(0, blocks.columns)
            odds = None if routed is None else routed.odds
            if odds is None:
                scores, seen = pattern.router_scores(q, k, layout, key_mask, scale, parameters)
                odds = pattern.odds(scores, seen, listed.to(scores.dtype), layout, key_mask)
            share = pattern.shares(odds, q, parameters, layout)
            _join_blocks(grid, ~listed, share, share, blocks, valid, pattern.feature)


def _half(dtype: torch.dtype) -> bool:
    """Whether states are products of half precision factors: float16 has not the range of sums."""
    return dtype == torch.bfloat16


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products, as in linear attention."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 or dtype != torch.float32 else "tf32x3"


def _sizes(features: int, channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of all kernels."""
    return {
        "FEATURES": features, "CHANNELS": channels, "BLOCK_F": power(features), "BLOCK_D": power(channels),
        "ROWS": ROWS if dtype != torch.float32 else ROWS // 2, "HALF": _half(dtype), "PRECISION": _precision(dtype),
    }  # fmt: skip


def _rows_beside(sizes: dict[str, Any], most: int) -> dict[str, int]:
    """Tokens of a step of a kernel that holds a state of these sizes: where it is large, no more than `most`."""
    large = max(sizes["BLOCK_F"], sizes["BLOCK_D"]) > 64
    return {"ROWS": min(sizes["ROWS"], most) if large else sizes["ROWS"]}


def _warps(given: dict[str, Any]) -> int:
    """Warps of a program, by the size of what it holds."""
    return 8 if max(given["BLOCK_F"], given["BLOCK_D"]) > 64 else 4


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "token", "head"))}


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
        valid: bool [B, tokens], or None.
        feature: Name of the feature map.
    """
    batch, length, heads, features = k.shape
    number, slots = groups
    dtype = torch.bfloat16 if _half(v.dtype) and tokens is not None else torch.float32
    sizes = _sizes(features, v.shape[3], v.dtype)
    return {
        "k": k, "v": v, "tokens": k if tokens is None else tokens,
        "valid": k if valid is None else valid.view(torch.uint8),
        "states": k.new_empty((batch, heads, number, features, v.shape[3]), dtype=dtype),
        "sums": k.new_empty((batch, heads, number, features), dtype=torch.float32),
        **_strides("k", k), **_strides("v", v), "valid_batch": length,
        "heads": heads, "groups": number, "slots": slots, "length": length,
        **sizes, **_rows_beside(sizes, BESIDE_STATE),
        "FEATURE": feature, "RUNS": tokens is None, "VALID": valid is not None,
    }  # fmt: skip


def _states(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: torch.Tensor | None,
    groups: tuple[int, int],
    valid: torch.Tensor | None,
    feature: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of groups of keys [B, heads, groups, F, D] and sums of features [B, heads, groups, F]."""
    given = states_arguments(k, v, tokens, groups, valid, feature)
    launch_like(group_states, (groups[0], k.shape[2], len(k)), given, _warps(given), STATES_STAGES[k.element_size()])
    return given["states"], given["sums"]


def join_arguments(
    q: torch.Tensor,
    out: torch.Tensor,
    state: torch.Tensor,
    sums: torch.Tensor,
    share: torch.Tensor | None,
    bias: torch.Tensor,
    tokens: torch.Tensor | None,
    feature: str,
) -> dict[str, Any]:
    """Arguments of `join_states`.

    Args:
        q: Grid queries [B, tokens, H, F].
        out: The softmax branch [B, tokens, H, D].
        state: [B, heads, 1 or groups, F, D].
        sums: [B, heads, 1 or groups, F].
        share: [B, H, groups], or None to add.
        bias: [D] where there is no share.
        tokens: Queries of each group; None for runs of all.
        feature: Name of the feature map.
    """
    sizes, length = _sizes(q.shape[3], out.shape[3], q.dtype), q.shape[1]
    wide = q.dtype == torch.float32
    sizes |= _rows_beside(sizes, BESIDE_STATE // 2 if wide else BESIDE_STATE)
    slots = STEPS * sizes["ROWS"] if tokens is None else tokens.shape[1]
    groups = -(-length // slots) if tokens is None else len(tokens)
    return {
        "q": q, "state": state, "sums": sums, "bias": bias, "share": bias if share is None else share,
        "out": out, "tokens": q if tokens is None else tokens, **_strides("q", q), **_strides("out", out),
        "heads": q.shape[2], "group": q.shape[2] // state.shape[1], "groups": groups, "states": state.shape[2],
        "slots": slots, "length": length, "least": LEAST,
        **sizes, "FEATURE": feature, "RUNS": tokens is None, "SHARE": share is not None,
        "WIDE": wide, "STAGES": JOIN_STAGES[q.dtype],
    }  # fmt: skip


def join_warps(given: dict[str, Any]) -> int:
    """Warps of a program of `join_states`: with few of them more programs have room."""
    return _warps(given) if given["WIDE"] else 4


def _start_join(given: dict[str, Any]) -> None:
    q = given["q"]
    launch_like(join_states, (given["groups"], q.shape[2], len(q)), given, join_warps(given), given["STAGES"])


def _add_all(
    grid: list[torch.Tensor], valid: torch.Tensor | None, feature: str, own: Mapping[str, torch.Tensor]
) -> None:
    """SLA with sums over all keys: the map is of the state, which is small, instead of the outputs."""
    q, k, v, out = grid
    slots, groups = splitting(k.shape[1], len(k) * k.shape[2], ROWS, k.device)
    states, sums = _states(k, v, None, (groups, slots), valid, feature)
    state = states.sum(2, keepdim=True) @ own["weight"].T
    state = state.to(v.dtype if _half(v.dtype) else torch.float32).contiguous()
    bias = own["bias"].contiguous()
    _start_join(join_arguments(q, out, state, sums.sum(2, keepdim=True), None, bias, None, feature))


def _join_blocks(
    grid: list[torch.Tensor],
    of: torch.Tensor,
    share: torch.Tensor | None,
    bias: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    feature: str,
) -> None:
    """Linear attention of query blocks over the key blocks `of` [B, H or 1, rows, columns], some heads at a time."""
    q, k, v, out = grid
    rows, columns = (part_tokens(*side, 1, q.device) for side in blocks.sides)
    heads, kv_heads = q.shape[2], k.shape[2]
    each, of = heads // kv_heads, of.expand(len(q), heads, -1, -1)
    size = len(q) * (columns.shape[0] + each * rows.shape[0]) * q.shape[3] * v.shape[3] * v.element_size()
    step = max(1, SLICE // size)
    for first in range(0, kv_heads, step):
        keys = slice(first, min(kv_heads, first + step))
        own = slice(each * first, each * keys.stop)
        states, sums = _states(k[:, :, keys], v[:, :, keys], columns, (len(columns), columns.shape[1]), valid, feature)
        some = of[:, own].unflatten(1, (-1, each)).flatten(2, 3)
        state = some.to(states.dtype) @ states.flatten(3)
        total = some.to(sums.dtype) @ sums
        shape = (len(q), own.stop - own.start, len(rows), q.shape[3])
        part = None if share is None else share[:, own].contiguous()
        given = state.view(*shape, v.shape[3]), total.view(shape), part, bias.contiguous(), rows, feature
        _start_join(join_arguments(q[:, :, own], out[:, :, own], *given))


def _means(
    grid: list[torch.Tensor], blocks: Blocks, valid: torch.Tensor | None, scale: float, routed: Routed | None
) -> tuple[Means, Means]:
    """Scaled means of queries and means of keys, those of the router where it has listed."""
    if routed is not None:
        return routed.means
    query, key = (block_means(x, *side, valid) for x, side in zip(grid[:2], blocks.sides, strict=True))
    return Means(scale * query.mean, query.count), key


def _add_coarse(
    grid: list[torch.Tensor],
    blocks: Blocks,
    valid: torch.Tensor | None,
    means: tuple[Means, Means],
    own: Mapping[str, torch.Tensor],
) -> None:
    """VSA: attention of means, queries scaled, behind a gate."""
    q, k, v, out = grid
    (query, _), (key, count) = means
    value, each = block_means(v, *blocks.sides[1], valid).mean, q.shape[2] // k.shape[2]
    # In the dtype of q, for which torch has the faster kernels.
    query, key, value = (x.to(q.dtype) for x in (query, key, value))
    key, value = (x if each == 1 else x.repeat_interleave(each, 1) for x in (key, value))
    mask = blind = None
    if valid is not None:
        mask = count[:, None, None] > 0
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    coarse = fused(query, key, value, mask, scale=1.0)
    coarse = coarse if blind is None else coarse.masked_fill(blind, 0)
    tokens = part_tokens(*blocks.sides[0], 1, q.device)
    _start_gated(gated_arguments(q, out, coarse, own["gate"], own.get("gate_map"), tokens))


def gated_arguments(
    q: torch.Tensor,
    out: torch.Tensor,
    coarse: torch.Tensor,
    gate: torch.Tensor,
    gate_map: torch.Tensor | None,
    tokens: torch.Tensor,
) -> dict[str, Any]:
    """Arguments of `add_gated`.

    Args:
        q: Grid queries [B, tokens, H, F].
        out: The softmax branch [B, tokens, H, D].
        coarse: [B, H, blocks, D].
        gate: [H, D].
        gate_map: [H, F, D], or None.
        tokens: Queries of each block.
    """
    gate = gate.contiguous()
    by = gate if gate_map is None else gate_map.to(q.dtype).contiguous()
    return {
        "q": q, "coarse": coarse.float().contiguous(), "gate": gate, "gate_map": by, "out": out, "tokens": tokens,
        **_strides("q", q), **_strides("out", out), "heads": q.shape[2], "groups": len(tokens),
        "slots": tokens.shape[1], **_sizes(q.shape[3], out.shape[3], q.dtype), "MAP": gate_map is not None,
    }  # fmt: skip


def _start_gated(given: dict[str, Any]) -> None:
    q, tokens = given["q"], given["tokens"]
    programs = len(tokens) * -(-tokens.shape[1] // given["ROWS"])
    launch_like(add_gated, (programs, q.shape[2], len(q)), given, _warps(given), 1)
