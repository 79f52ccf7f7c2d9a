"""Attention in 8 bits by operators of torch: the errors of the kernels of 8 bits, on any device, without their speed.

Rounds where the kernels round: queries to int8 with a scale each, keys to int8 with a scale per tile after their mean
per head is taken away, values to int8 or e4m3 with a scale per channel after the middle of their range or their mean
is, and the weights of 128 keys, two tiles of a list, relative to the largest among them. Products are in float32, or
float64 for float64 inputs. The mask of all pairs of tokens is made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.masks import settled, visible
from visattn.kernels.triton.boxes import tiled
from visattn.layout import Layout
from visattn.operands import wide_dtype
from visattn.patterns import Dense, DynamicPattern, Pattern, RoutedPattern
from visattn.problem import Call, Problem, Support

# Queries of a tile, keys that share a scale, and tiles whose weights are relative to one largest, as the kernels have.
ROWS, TILE, PER_STEP = 128, 64, 2
# Weights reach from 0 to this, and so do values that are rounded to e4m3.
INT8_MAX, FP8_TOP, FP8_MAX = 127.0, 256.0, 448.0
# Pairs of tokens up to which a call is simulated: the mask has a byte for each.
LARGEST = 2**32


def simulates(problem: Problem) -> Support:
    """Whether a call is one whose errors are simulated."""
    pattern = problem.pattern
    if problem.device != "cpu":
        return Support(False, f"it simulates {problem.precision}, for its errors and not for speed, on CPUs only")
    if problem.rpb:
        return Support(False, f"in {problem.precision} it adds no relative position bias")
    if isinstance(pattern, RoutedPattern) and pattern.pools_rest:
        return Support(False, f"in {problem.precision} it pools no keys of what {pattern.name} leaves out")
    if isinstance(pattern, DynamicPattern) and pattern.skip:
        return Support(False, f"in {problem.precision} it skips nothing of what {pattern.name} lists")
    if problem.layout.pairs > LARGEST:
        return Support(False, f"its mask of {problem.layout.pairs:.3g} pairs of tokens is over {LARGEST}")
    return Support(True)


def simulate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H], see `Backend.run`."""
    wide = wide_dtype(q)
    seen = visible(call, q, k)
    k, v = settled(k, call.key_mask), settled(v, call.key_mask)
    fp8, group = call.precision == "fp8", q.shape[2] // k.shape[2]
    # A choice that q and k make is in the mask.
    listed = Dense() if isinstance(call.pattern, RoutedPattern) else call.pattern
    walk = walk_of(listed, call.layout, q.device)
    queries, q_scale = as_bytes(q.to(wide), (3,))
    shift = k.to(wide).mean(1, keepdim=True)
    middle = v.to(wide).mean(1, keepdim=True)
    if not fp8:
        middle = 0.5 * (v.to(wide).amax(1, keepdim=True) + v.to(wide).amin(1, keepdim=True))
    keys, k_scale = as_bytes(_taken(k.to(wide) - shift, walk.tokens), (2, 4))
    values, v_scale = _values(v.to(wide) - middle, fp8)
    values = _taken(values, walk.tokens)
    keys, values, k_scale = (t.repeat_interleave(group, 3) for t in (keys, values, k_scale))
    v_scale, middle, shift = (t.repeat_interleave(group, 2) for t in (v_scale, middle, shift))
    out, lse = q.new_zeros(q.shape, dtype=wide), q.new_zeros(q.shape[:3], dtype=wide)
    for rows, tiles in zip(walk.rows, walk.tiles, strict=True):
        tokens = walk.tokens[tiles].flatten()
        shown = seen[:, :, rows].index_select(3, tokens.clamp(min=0)) & (tokens >= 0)
        scores = torch.einsum("bqhd,btkhd->bhqtk", queries[:, rows], keys[:, tiles])
        factor = k_scale[:, tiles].permute(0, 3, 4, 1, 2) * q_scale[:, rows].permute(0, 2, 1, 3)[..., None]
        scores = (scores * factor).flatten(3) * call.scale
        found = _attended(scores.masked_fill(~shown, float("-inf")), values[:, tiles].flatten(1, 2), fp8)
        out[:, rows], lse[:, rows] = found
    out = torch.where(lse.isfinite()[..., None], out * v_scale + middle, 0.0)
    offset = torch.einsum("bqhd,bkhd->bqh", q.to(wide), shift) * call.scale
    return out.to(q.dtype), lse + offset if call.lse else None


class Walk(NamedTuple):
    """Which key tiles each query tile visits.

    Attributes:
        tokens: Keys of each tile, -1 in empty slots: [tiles, TILE].
        rows: Queries of each query tile.
        tiles: Key tiles of each query tile, whole steps of them; the last tile is empty.
    """

    tokens: torch.Tensor
    rows: tuple[torch.Tensor, ...]
    tiles: tuple[torch.Tensor, ...]


@kept
def walk_of(pattern: Pattern, layout: Layout, device: torch.device) -> Walk:
    """The walk of a pattern along the tiles of the kernels."""
    made = tiled(pattern, layout, ROWS, TILE)
    filled = np.pad(made.keys.tokens, ((0, 1), (0, TILE - made.keys.capacity)), constant_values=-1)
    rows, tiles = [], []
    for i, own in enumerate(made.queries.tokens):
        # A query tile that visits nothing gets an empty step.
        visited = made.lists.tile[made.lists.start[i] : made.lists.start[i + 1]]
        missing = max(PER_STEP - len(visited), -len(visited) % PER_STEP)
        rows.append(torch.from_numpy(own[own >= 0]).to(device))
        tiles.append(torch.from_numpy(np.pad(visited, (0, missing), constant_values=len(filled) - 1)).to(device))
    return Walk(torch.from_numpy(filled).to(device), tuple(rows), tuple(tiles))


def as_bytes(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to 127 and their scale, which what these dims hold shares."""
    most = x.abs().amax(dims, keepdim=True)
    scale = torch.where(most > 0, most, 1.0) / INT8_MAX
    return (x / scale).round(), scale


def _taken(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, H, D] in tiles [B, tiles, slots, H, D], zeros in empty slots."""
    ordered = x.index_select(1, tokens.flatten().clamp(min=0)).unflatten(1, tokens.shape)
    return ordered * (tokens >= 0)[..., None, None]


def _values(v: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in 8 bits, and the scale of each channel: [B, 1, H, D]."""
    if not fp8:
        return as_bytes(v, (1,))
    most = v.abs().amax(1, keepdim=True)
    scale = torch.where(most > 0, most, 1.0) / FP8_MAX
    return as_e4m3(v / scale), scale


def as_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest floats of 8 bits with 4 of exponent and 3 of mantissa."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _weights(exact: torch.Tensor, fp8: bool) -> torch.Tensor:
    """Weights from 0 to 1 as 8 bits have them."""
    return as_e4m3(exact * FP8_TOP) / FP8_TOP if fp8 else (exact * INT8_MAX).round() / INT8_MAX


def _attended(scores: torch.Tensor, values: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output without scale and shift [B, rows, H, D] and log-sum-exp [B, rows, H] of logits [B, H, rows, slots]."""
    steps = scores.unflatten(3, (-1, PER_STEP * TILE))
    largest = steps.amax(4, keepdim=True)
    level = largest.amax(3, keepdim=True)
    own, level = (t.masked_fill(t == float("-inf"), 0.0) for t in (largest, level))
    exact, factor = torch.exp(steps - own), torch.exp(largest - level)
    weights = _weights(exact, fp8)
    # Sums of integers are exact on tensor cores; floats are added up before they are rounded.
    total = ((exact if fp8 else weights) * factor).sum((3, 4))
    weights = (weights * factor).flatten(3, 4)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    out = out / total.masked_fill(total == 0, 1.0).transpose(1, 2)[..., None]
    return out, (level[..., 0, 0] + total.log()).transpose(1, 2)
