"""Attention in 8 bits by operators of torch: the errors of the kernels of 8 bits, on any device, without their speed.

Rounds where the kernels round: queries to int8 with a scale each, keys to int8 with a scale per tile after their mean
per head is taken away, values to int8 or e4m3 with a scale per channel after the middle of their range is taken away, and
the weights of each run of 128 keys relative to the largest among them. Products are in float32, or float64 for float64
inputs. It computes every pair of tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.masks import visible
from visattn.layout import Layout
from visattn.patterns import RoutedPattern
from visattn.problem import Call, Problem, Support
from visattn.tiling import Tiling, box_shape

# Keys that share a scale, and keys whose weights are relative to one largest: a step of the kernels.
TILE, STEP = 64, 128
# Weights reach from 0 to this, and so do values that are rounded to e4m3.
INT8_MAX, FP8_TOP, FP8_MAX = 127.0, 256.0, 448.0
# Scores of all samples and heads up to which a call is simulated, and scores that are held at once.
LARGEST = 2**32
ENTRIES = 2**24


def simulates(problem: Problem) -> Support:
    """Whether a call is one whose errors are simulated."""
    pattern = problem.pattern
    if problem.device != "cpu":
        return Support(False, f"it simulates {problem.precision}, for its errors and not for speed, on CPUs only")
    if problem.rpb:
        return Support(False, f"in {problem.precision} it adds no relative position bias")
    if isinstance(pattern, RoutedPattern) and pattern.pools_rest:
        return Support(False, f"in {problem.precision} it pools no keys of what {pattern.name} leaves out")
    if problem.dense_pairs > LARGEST:
        return Support(
            False, f"it simulates {problem.precision} by {problem.dense_pairs:.3g} scores, which is over {LARGEST}"
        )
    return Support(True)


def simulate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H], see `Backend.run`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    fp8 = call.precision == "fp8"
    tokens = key_order(call.layout.keys, k.shape[1] - call.layout.keys.length).to(q.device)
    group = q.shape[2] // k.shape[2]
    queries, q_scale = as_bytes(q.to(wide), (3,))
    shift = k.to(wide).mean(1, keepdim=True)
    keys, k_scale = _keys(k.to(wide) - shift, tokens)
    middle = 0.5 * (v.to(wide).amax(1, keepdim=True) + v.to(wide).amin(1, keepdim=True))
    values, v_scale = _values(v.to(wide) - middle, tokens, fp8)
    seen = visible(call, q, k)
    keys, values, k_scale, v_scale, middle, shift = (
        t.repeat_interleave(group, 2) for t in (keys, values, k_scale, v_scale, middle, shift)
    )
    offset = torch.einsum("bqhd,bkhd->bqh", q.to(wide), shift) * call.scale
    rows = max(1, ENTRIES // (q.shape[0] * q.shape[2] * len(tokens)))
    outs, sums = [], []
    for first in range(0, q.shape[1], rows):
        part = slice(first, first + rows)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries[:, part], keys)
        factor = q_scale[:, part, :, 0].transpose(1, 2)[..., None] * k_scale[..., 0].transpose(1, 2)[:, :, None]
        shown = seen[:, :, part].index_select(3, tokens.clamp(min=0)) & (tokens >= 0)
        scores = (scores * factor * call.scale).masked_fill(~shown, float("-inf"))
        out, lse = _attended(scores, values, fp8)
        outs.append(out)
        sums.append(lse)
    out, lse = torch.cat(outs, 1), torch.cat(sums, 1)
    out = torch.where(lse.isfinite()[..., None], out * v_scale + middle, 0.0)
    return out.to(q.dtype), lse + offset if call.lse else None


@kept
def key_order(layout: Layout, extra: int) -> torch.Tensor:
    """The keys in tiles of the grid, then the dense ones, -1 in empty slots: whole steps."""
    grid = Tiling(layout, box_shape(layout.grid, TILE))
    suffix = layout.prefix + layout.tokens
    runs = ((0, layout.prefix), (suffix, layout.suffix), (layout.length, extra))
    parts = [grid.tokens[grid.grid_tiles].ravel(), *(first + np.arange(count) for first, count in runs)]
    filled = [np.pad(part, (0, -len(part) % STEP), constant_values=-1) for part in parts]
    return torch.from_numpy(np.concatenate(filled))


def as_bytes(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to 127 and their scale, which what these dims hold shares."""
    most = x.abs().amax(dims, keepdim=True)
    scale = torch.where(most > 0, most, 1.0) / INT8_MAX
    return (x / scale).round(), scale


def _taken(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, H, D] in an order, zeros in empty slots."""
    return x.index_select(1, tokens.clamp(min=0)) * (tokens >= 0)[:, None, None]


def _keys(k: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in an order as whole numbers, and the scale of each: [B, slots, H, 1]."""
    ordered = _taken(k, tokens)
    tiles = ordered.unflatten(1, (-1, TILE))
    numbers, scale = as_bytes(tiles, (2, 4))
    return numbers.flatten(1, 2), scale.expand(-1, -1, TILE, -1, -1).flatten(1, 2)


def _values(v: torch.Tensor, tokens: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in an order in 8 bits, and the scale of each channel: [B, 1, H, D]."""
    if not fp8:
        numbers, scale = as_bytes(v, (1,))
        return _taken(numbers, tokens), scale
    most = v.abs().amax(1, keepdim=True)
    scale = torch.where(most > 0, most, 1.0) / FP8_MAX
    return _taken(as_e4m3(v / scale), tokens), scale


def as_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest floats of 8 bits with 4 of exponent and 3 of mantissa."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _attended(scores: torch.Tensor, values: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output without scale and shift [B, rows, H, D] and log-sum-exp [B, rows, H] of logits [B, H, rows, slots]."""
    steps = scores.unflatten(3, (-1, STEP))
    largest = steps.amax(4, keepdim=True)
    whole = largest.amax(3, keepdim=True)
    finite, level = (t.masked_fill(t == float("-inf"), 0.0) for t in (largest, whole))
    weights = torch.exp(steps - finite)
    weights = as_e4m3(weights * FP8_TOP) / FP8_TOP if fp8 else (weights * INT8_MAX).round() / INT8_MAX
    weights = (weights * torch.exp(largest - level)).flatten(3, 4)
    total = weights.sum(3)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    out = out / total.masked_fill(total == 0, 1.0).transpose(1, 2)[..., None]
    return out, (level[..., 0, 0] + total.log()).transpose(1, 2)
