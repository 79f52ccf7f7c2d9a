"""torch's scaled_dot_product_attention: plain where the pattern covers the grid, causal on lines, else with a mask."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.dispatch import Backend, overhead, wall
from visattn.kernels.choosing import choosing_cost, unshared
from visattn.kernels.fused import fused
from visattn.kernels.masks import visible
from visattn.kernels.scores import log_sum_exp
from visattn.kernels.second_order import lists_with_formula
from visattn.kernels.triangular import attend_triangular, triangular_part
from visattn.patterns import DynamicPattern, ListedPattern, RoutedPattern
from visattn.problem import Call, Problem, Support, is_triangular

# A bool mask of this many entries is 256 MiB.
LARGEST_MASK = 2**28
# What a call keeps the host of a GPU, in microseconds: with a mask, and dense (docs/performance.md).
HOST_US = (60, 40)
# What a call keeps the device at least, and one program for 128 keys (fitted to the same calls).
DEVICE_US, KEYS_US = 7, 1.7


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
        if _needs_mask(problem):
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
        """All pairs, more with a mask, half on causal lines; the log-sum-exp is a product more of both."""
        masked = _needs_mask(problem)
        rate = MASKED.get(problem.device, 1.6) if masked else KEY_MASKED if problem.key_mask else 1.0
        part = 1.0 if masked or problem.is_dense else triangular_part(problem.layout)
        pairs = problem.dense_pairs * part * (rate + problem.lse * LSE.get(problem.device, 3.0))
        own_ms = CALL_MS
        if masked and problem.device != "cuda" and isinstance(problem.pattern, RoutedPattern):
            own_ms += CHOOSING_MS
            apart = isinstance(problem.pattern, DynamicPattern)
            pairs += unshared(problem.dense_pairs * CHOSEN[apart] / problem.head_dim)
            choosing = choosing_cost(problem.pattern, problem.layout, problem.head_dim)
            pairs += max(1, problem.batch) * problem.heads * choosing
        # Few queries are bound by one program's way through all keys.
        pairs = max(pairs, overhead(problem, 0, KEYS_US * problem.layout.keys.length / 128))
        pairs += overhead(problem, 0, DEVICE_US)
        return wall(problem, pairs, cpu_ms=own_ms, host_us=HOST_US[not masked], operator=not problem.is_dense)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        return lists_with_formula(attend, q, k, v, call, of_operators=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention in torch's kernels, whose gradients have none; arguments as in `Backend.run`."""
    dense = call.pattern.covers(*call.layout.grids)
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not dense and call.key_mask is None and is_triangular(call.pattern, call.layout):
        out, lse = attend_triangular(*heads_first, call.layout, call.scale, call.lse)
        return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)
    mask = None if dense and call.key_mask is None else _visible(q, k, call, dense)
    blind = None
    if mask is not None and (call.key_mask is not None or isinstance(call.pattern, DynamicPattern)):
        # Kernels differ in what a row without visible keys gives, some NaN: let it see all, then zero it.
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind
    out = fused(*heads_first, attn_mask=mask, scale=call.scale)
    lse = log_sum_exp(heads_first[0], heads_first[1], mask, call.scale) if call.lse else None
    if blind is not None:
        out = out.masked_fill(blind, 0)
        lse = None if lse is None else lse.masked_fill(blind[..., 0], float("-inf"))
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


# Time over plain SDPA's with a full mask, with a key mask alone, and of the log-sum-exp on its own
# (measured: scripts/bench/backends.py).
MASKED, KEY_MASKED = {"cpu": 1.2, "cuda": 1.6}, 1.1
LSE = {"cpu": 3.0, "cuda": 16.0}
# What a call takes on a CPU besides, and one whose q and k choose, in milliseconds; and what making a mask of what they
# chose takes there for each pair, in channels of dense attention: where all heads share it, and where each has its own.
CALL_MS, CHOOSING_MS = 0.05, 0.6
CHOSEN = (25.0, 110.0)


def _needs_mask(problem: Problem) -> bool:
    """Whether a call needs a mask of queries and keys."""
    return not problem.is_dense and (problem.key_mask or not problem.is_triangular)


def _visible(q: torch.Tensor, k: torch.Tensor, call: Call, dense: bool) -> torch.Tensor:
    """Visibility [1 or B, 1 or H, S or 1, keys]; one row where all queries see the same keys."""
    if not dense:
        return visible(call, q, k)
    assert call.key_mask is not None
    return call.key_mask[:, None, None, :]


backend = Sdpa()
