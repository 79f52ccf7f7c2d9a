"""NATTEN's neighborhood attention kernels, on the part of the patterns that NATTEN defines."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch

from visattn.dispatch import Backend, overhead, visited_pairs, wall
from visattn.kernels.fused import fused
from visattn.kernels.scores import log_sum_exp
from visattn.kernels.second_order import lists_with_formula
from visattn.patterns import ListedPattern, Neighborhood
from visattn.plans import TilePlan, plan
from visattn.problem import Call, Problem, Support

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# NATTEN without its own kernels runs eager FlexAttention, whose score matrix of this many entries is 1 GiB.
LARGEST_EAGER = 2**28
# What a call keeps the host of an H100, in microseconds (measured at 96x96 tokens).
CALL_US = 1400
# Tokens of its query and key tiles, and the copies of q, k, v and the output into and out of the order of its tiles:
# each read and written, at so many bytes per second of an H100 (docs/performance.md).
TILE, COPIES, COPY_RATE = 128, 4, 1.5e12


class Natten(Backend):
    """`na(...)` through natten: its CUDA kernels where they were built, its FlexAttention path elsewhere.

    Grid queries see dense tokens as natten's additional keys; dense queries are one SDPA call over all keys.
    """

    name: ClassVar[str] = "natten"

    def available(self) -> Support:
        """Whether natten can be imported."""
        module, reason = _natten()
        return Support(module is not None, reason)

    def supports(self, problem: Problem) -> Support:
        """Neighborhoods as NATTEN defines them, without key mask and position bias."""
        reason = _pattern_refusal(problem) or _call_refusal(problem)
        return Support(not reason, reason)

    def cost(self, problem: Problem) -> float:
        """Slots of NATTEN's own tiles at the rate of its kernels, or all pairs where eager FlexAttention stands in."""
        if _eager(problem):
            return problem.dense_pairs * EAGER + overhead(problem, cpu_ms=5.0, cuda_us=CALL_US)
        tokens = max(1, problem.batch) * problem.heads * problem.layout.length
        copies = COPIES * tokens * problem.head_dim * problem.dtype.itemsize / COPY_RATE
        pairs = visited_pairs(problem, own_tiles(problem)) * KERNEL + overhead(problem, 0, 1e6 * copies)
        return wall(problem, pairs, cpu_ms=5.0, host_us=CALL_US)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        return lists_with_formula(attend, q, k, v, call)


def own_tiles(problem: Problem) -> TilePlan:
    """The plan of a call in tiles as large as NATTEN's."""
    pattern, layout = problem.pattern, problem.layout
    assert isinstance(pattern, ListedPattern)
    return plan(pattern, layout, tile=pattern.tile(pattern.tiled_layout(layout).grid, TILE))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by NATTEN; arguments as in `Backend.run`."""
    layout, pattern = call.layout, call.pattern
    assert isinstance(pattern, Neighborhood)
    module, reason = _natten()
    assert module is not None, reason
    if call.scale == 0:
        # NATTEN takes a scale of 0 for none given; zero queries are the same logits.
        q, scale = q * 0, 1.0
    else:
        scale = call.scale
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    window, stride, dilation, causal = zip(*pattern.axes(layout.grid), strict=True)
    grid = [t[:, inner].unflatten(1, layout.grid) for t in (q, k, v)]
    extra = [torch.cat([t[:, : inner.start], t[:, inner.stop :]], 1) for t in (k, v)]
    given: dict[str, Any] = {}
    if extra[0].shape[1]:
        given = {"additional_keys": extra[0], "additional_values": extra[1]}
    run = (module.na1d, module.na2d, module.na3d)[layout.dims - 1]
    out, lse = run(
        *grid,
        kernel_size=window,
        stride=tuple(map(min, stride, window)),
        dilation=dilation,
        is_causal=causal,
        scale=scale,
        return_lse=True,
        **given,
    )
    out, lse = out.flatten(1, layout.dims), lse.flatten(1, layout.dims)
    if not given:
        return out, lse if call.lse else None
    return _around_grid(q, k, v, out, lse, scale, inner, call.lse)


# Time per visited pair of NATTEN's CUDA kernels (65 to 79 % of the tile bound in its paper), and per pair of eager
# FlexAttention on a CPU, over that of dense SDPA: estimates.
KERNEL, EAGER = 1.4, 15.0


@lru_cache(maxsize=1)
def _natten() -> tuple[ModuleType | None, str]:
    """The package, or None and why not."""
    if importlib.util.find_spec("natten") is None:
        return None, "natten is not installed (pip install natten)"
    try:
        return importlib.import_module("natten"), ""
    except Exception as error:  # A build for another torch fails in many ways.
        return None, f"natten does not import: {type(error).__name__}: {error}"


def _eager(problem: Problem) -> bool:
    module, _ = _natten()
    return problem.device != "cuda" or not getattr(module, "HAS_LIBNATTEN", False)


def _pattern_refusal(problem: Problem) -> str:
    """Why NATTEN does not define the pattern on the grid, empty if it does."""
    pattern, layout = problem.pattern, problem.layout
    if not isinstance(pattern, Neighborhood):
        return f"NATTEN runs na(...) only, not {pattern.name}"
    if any(pattern.rings(layout.grid)):
        return f"NATTEN has no axes that wrap around, and axis {pattern.rings(layout.grid).index(True)} is circular"
    for i, (length, (window, _, dilation, causal)) in enumerate(
        zip(layout.grid, pattern.axes(layout.grid), strict=True)
    ):
        if window < 2:
            return f"NATTEN takes windows of at least 2, and axis {i} has {window}"
        if window * dilation > length:
            return f"window {window} * dilation {dilation} is larger than axis {i} ({length})"
        if causal and layout.dims == 1 and window == length and _eager(problem):
            return "NATTEN without its CUDA kernels runs no causal window over the whole axis"
    return ""


def _call_refusal(problem: Problem) -> str:
    """Why NATTEN does not take the call's tensors, empty if it does."""
    if problem.key_mask:
        return "NATTEN takes no key mask"
    if problem.rpb:
        return "NATTEN has no relative position bias"
    if problem.dtype not in DTYPES:
        return f"NATTEN computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if problem.device not in ("cpu", "cuda"):
        return f"NATTEN runs on cpu and cuda, not on {problem.device}"
    if not _eager(problem):
        return "" if problem.head_dim % 8 == 0 else f"head_dim {problem.head_dim} is not a multiple of 8"
    if problem.device == "cpu" and problem.grad:
        return "NATTEN has no backward on a CPU"
    if problem.head_dim & (problem.head_dim - 1):
        return f"NATTEN without its CUDA kernels takes head dims that are powers of two, not {problem.head_dim}"
    if problem.dense_pairs > LARGEST_EAGER:
        return (
            f"NATTEN without its CUDA kernels builds the whole score matrix, and {problem.dense_pairs:.3g} entries "
            f"are over {LARGEST_EAGER}"
        )
    return ""


def _around_grid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    inner: slice,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put the dense tokens' rows, which see every key, before and after the grid's."""
    queries = torch.cat([q[:, : inner.start], q[:, inner.stop :]], 1).transpose(1, 2)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    dense = fused(queries, keys, values, scale=scale)
    before, after = dense.transpose(1, 2).tensor_split([inner.start], 1)
    out = torch.cat([before, out, after], 1)
    if not want_lse:
        return out, None
    before, after = log_sum_exp(queries, keys, None, scale).transpose(1, 2).tensor_split([inner.start], 1)
    return out, torch.cat([before, lse, after], 1)


backend = Natten()
