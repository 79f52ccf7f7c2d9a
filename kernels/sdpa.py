"""torch's scaled_dot_product_attention: plain where the pattern covers the grid, else with a dense mask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from visattn.dispatch import Backend, overhead, wall
from visattn.kernels.masks import visible
from visattn.kernels.second_order import lists_with_formula
from visattn.patterns import DynamicPattern, ListedPattern, RoutedPattern
from visattn.problem import Call, Problem, Support

# A bool mask of this many entries is 256 MiB.
LARGEST_MASK = 2**28
# What a call keeps the host of a GPU, in microseconds: with a mask, and dense (docs/performance.md).
HOST_US = (60, 40)
# What a call keeps the device at least, and one program for 128 keys (fitted to the same calls).
DEVICE_US, KEYS_US = 7, 1.7
# Entries of a block of scores that the log-sum-exp is taken over at a time.
SCORES = 2**22


class Sdpa(Backend):
    """Dense attention in torch's own kernels."""

    name: ClassVar[str] = "sdpa"
    portable: ClassVar[bool] = True
    key_layouts: ClassVar[bool] = True

    def available(self) -> Support:
        """Always: it comes with torch."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Anything without relative position bias whose mask fits in memory."""
        if not isinstance(problem.pattern, ListedPattern):
            return Support(False, f"{problem.pattern.name} is not attention under one mask")
        if problem.rpb:
            return Support(False, "it adds no relative position bias")
        if not problem.is_dense:
            pattern = problem.pattern
            if isinstance(pattern, RoutedPattern) and pattern.pools_rest:
                return Support(False, f"it has no pooled keys for what {pattern.name} leaves out")
            own = problem.key_mask or isinstance(pattern, RoutedPattern)
            heads = problem.heads if isinstance(pattern, DynamicPattern) else 1
            entries = problem.layout.pairs * heads * (problem.batch if own else 1)
            if entries > LARGEST_MASK:
                return Support(False, f"its dense mask of {entries:.3g} entries is over {LARGEST_MASK}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """All pairs, more of them with a mask; the log-sum-exp needs a second product of queries and keys."""
        masked = MASKED.get(problem.device, 1.6)
        rate = masked if not problem.is_dense else KEY_MASKED if problem.key_mask else 1.0
        pairs = problem.dense_pairs * (rate + problem.lse * LSE.get(problem.device, 3.0))
        # Few queries are bound by one program's way through all keys.
        pairs = max(pairs, overhead(problem, 0, KEYS_US * problem.layout.keys.length / 128))
        pairs += overhead(problem, 0, DEVICE_US)
        return wall(problem, pairs, cpu_ms=0.05, host_us=HOST_US[problem.is_dense], operator=not problem.is_dense)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        return lists_with_formula(attend, q, k, v, call, of_operators=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in torch's kernels, whose gradients have none; arguments as in `Backend.run`."""
    dense = call.pattern.covers(*call.layout.grids)
    mask = None if dense and call.key_mask is None else _visible(q, k, call, dense)
    blind = None
    if mask is not None and (call.key_mask is not None or isinstance(call.pattern, DynamicPattern)):
        # Kernels differ in what a row without visible keys gives, some NaN: let it see all, then zero it.
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    # While torch.jit.trace records, sizes are tensors.
    grouped = bool(q.shape[2] != k.shape[2])
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=call.scale, enable_gqa=grouped)
    lse = log_sum_exp(heads_first[0], heads_first[1], mask, call.scale) if call.lse else None
    if blind is not None:
        out = out.masked_fill(blind, 0)
        lse = None if lse is None else lse.masked_fill(blind[..., 0], float("-inf"))
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


# Time over plain SDPA's with a full mask, with a key mask alone, and of the log-sum-exp on its own
# (measured: scripts/bench/backends.py).
MASKED, KEY_MASKED = {"cpu": 1.2, "cuda": 1.6}, 1.1
LSE = {"cpu": 3.0, "cuda": 16.0}


def _visible(q: torch.Tensor, k: torch.Tensor, call: Call, dense: bool) -> torch.Tensor:
    """Visibility [1 or B, 1 or H, S or 1, keys]; one row where all queries see the same keys."""
    if not dense:
        return visible(call, q, k)
    assert call.key_mask is not None
    return call.key_mask[:, None, None, :]


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Log-sum-exp of the visible logits, a few queries at a time so that no S x S scores exist.

    Args:
        q: Queries [B, H, S, D].
        k: Keys [B, Hkv, N, D].
        mask: Visibility [1 or B, 1, S or 1, N], or None.
        scale: Factor on the logits.

    Returns:
        [B, H, S] in float32, or float64 for float64 inputs.
    """
    batch, heads, length, _ = q.shape
    step = max(1, SCORES // (batch * heads * k.shape[2]))
    parts = []
    for start in range(0, length, step):
        rows = slice(start, start + step)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        # Recomputed in the backward, which would else keep every block of scores.
        parts.append(checkpoint(_block_lse, q[:, :, rows], k, part, scale, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _block_lse(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows, head_dim = q.shape
    # The heads that share a key head are rows of one product: no copy of the keys per head.
    grouped = q.reshape(batch, k.shape[1], -1, head_dim).to(wide) * scale
    scores = (grouped @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.logsumexp(-1)


backend = Sdpa()
