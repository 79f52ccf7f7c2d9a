"""xFormers' memory_efficient_attention, for the masks that its biases can state."""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch

from visattn.dispatch import Backend, overhead
from visattn.kernels.masks import visible
from visattn.kernels.second_order import lists_with_formula
from visattn.operands import repeated
from visattn.patterns import ListedPattern, Neighborhood
from visattn.problem import Call, Problem, Support

# A bias of this many entries in 2 bytes each is 128 MiB.
LARGEST_BIAS = 2**26
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Xformers(Backend):
    """Dense attention, blocked attention (a block is a sample of its own), and small grids under a tensor bias."""

    name: ClassVar[str] = "xformers"

    def available(self) -> Support:
        """Whether xformers imports and its kernels can run on a device here."""
        if not torch.cuda.is_available():
            return Support(False, "xFormers has no operator for a CPU, and there is no CUDA device")
        module, reason = _ops()
        return Support(module is not None, reason)

    def supports(self, problem: Problem) -> Support:
        """What its biases state."""
        reason = _refusal(problem)
        return Support(not reason, reason)

    def cost(self, problem: Problem) -> float:
        """Visible pairs of blocks, else all pairs, more of them under a bias."""
        block = block_of(problem)
        if block is not None:
            pairs = problem.dense_pairs * math.prod(block) / problem.layout.tokens
        else:
            pairs = problem.dense_pairs * (1.0 if problem.is_dense else BIASED)
        return pairs * RATE + overhead(problem, cpu_ms=0.1, cuda_us=80)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        return lists_with_formula(attend, q, k, v, call)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by xFormers; arguments as in `Backend.run`."""
    ops, reason = _ops()
    assert ops is not None, reason
    block = block_of(Problem.of(q, k, v, call))
    if block is not None:
        queries, keys, values = (to_blocks(t, call.layout.grid, block) for t in (q, k, v))
        out = _attend(ops, queries, keys, values, None, call.scale)
        return from_blocks(out, call.layout.grid, block), None
    bias = None if call.pattern.covers(*call.layout.grids) else _bias(visible(call, q, k), q)
    return _attend(ops, q, k, v, bias, call.scale), None


# Time over torch's SDPA per pair (Flash kernels behind both), and under a tensor bias: estimates.
RATE, BIASED = 1.1, 2.0


@lru_cache(maxsize=1)
def _ops() -> tuple[ModuleType | None, str]:
    """The module of operators, or None and why not."""
    if importlib.util.find_spec("xformers") is None:
        return None, "xformers is not installed (pip install xformers)"
    try:
        return importlib.import_module("xformers.ops"), ""
    except Exception as error:  # A build for another torch fails in many ways.
        return None, f"xformers does not import: {type(error).__name__}: {error}"


def _refusal(problem: Problem) -> str:
    """Why xFormers does not run a call, empty if it does."""
    pattern = problem.pattern
    if problem.device != "cuda":
        return f"xFormers has no operator for {problem.device}"
    if not isinstance(pattern, ListedPattern):
        return f"{pattern.name} is not attention under one mask"
    if problem.rpb:
        return "its biases get no gradient that a relative position bias could use"
    if problem.lse:
        return "its public function returns no log-sum-exp"
    if problem.key_mask:
        return "rows without any visible key are undefined in its kernels"
    if problem.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if problem.head_dim % 8:
        return f"head_dim {problem.head_dim} is not a multiple of 8"
    if problem.is_dense or block_of(problem) is not None:
        return ""
    entries = problem.layout.length**2 * problem.heads * problem.batch
    if entries > LARGEST_BIAS:
        return f"its bias tensor of {entries:.3g} entries is over {LARGEST_BIAS}"
    return ""


def block_of(problem: Problem) -> tuple[int, ...] | None:
    """The block per axis if the pattern is blocked attention that tiles the grid and nothing else, else None."""
    pattern, layout = problem.pattern, problem.layout
    if not isinstance(pattern, Neighborhood) or layout.prefix or layout.suffix:
        return None
    axes = pattern.axes(layout.grid)
    blocked = all(
        window == stride and dilation == 1 and not causal and n % window == 0
        for n, (window, stride, dilation, causal) in zip(layout.grid, axes, strict=True)
    )
    return tuple(window for window, *_ in axes) if blocked else None


def to_blocks(x: torch.Tensor, grid: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """Cut [B, tokens, H, D] in blocks as samples: [B * blocks, block tokens, H, D]."""
    dims = len(grid)
    sides = [part for n, b in zip(grid, block, strict=True) for part in (n // b, b)]
    outer, inner = range(1, 1 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
    cut = x.unflatten(1, sides).permute(0, *outer, *inner, 1 + 2 * dims, 2 + 2 * dims)
    return cut.flatten(1 + dims, 2 * dims).flatten(0, dims)


def from_blocks(x: torch.Tensor, grid: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `to_blocks`: [B, tokens, H, D]."""
    dims = len(grid)
    counts = [n // b for n, b in zip(grid, block, strict=True)]
    cut = x.unflatten(1, block).unflatten(0, (-1, *counts))
    order = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    return cut.permute(0, *order, 1 + 2 * dims, 2 + 2 * dims).flatten(1, 2 * dims)


def _bias(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The mask as an additive bias [B, H, S, keys]; rows start at multiples of 8, as its kernels want."""
    keys = mask.shape[-1]
    padded = q.new_full((*mask.shape[:-1], keys + -keys % 8), 0.0)[..., :keys]
    padded.masked_fill_(~mask, float("-inf"))
    return padded.expand(q.shape[0], q.shape[2], -1, -1)


def _attend(ops: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
    """Key heads repeat for the query heads that share them: its kernels want equal numbers."""
    k, v = (repeated(t, q.shape[2]) for t in (k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


backend = Xformers()
