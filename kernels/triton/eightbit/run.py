"""Calls of `attention` in 8 bits on the Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from visattn.keep import CALL_BYTES, STORE
from visattn.kernels.masks import settled
from visattn.kernels.triton.arguments import Operands
from visattn.kernels.triton.config import DIRECTIONS, EIGHT, EIGHT_HOPPER, Config, config, family
from visattn.kernels.triton.hopper.launch import hopper_config
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern, RoutedPattern
from visattn.problem import Call, Problem, Support

# Channels that a product of bytes takes at once.
SMALLEST = 32


def eight_config(
    architecture: int, dtype: torch.dtype, head_dim: int, pattern: Pattern, layout: Layout, masked: bool
) -> Config:
    """The configuration of the forward in 8 bits.

    Args:
        architecture: Compute capability times ten, 0 for the interpreter.
        dtype: Of q, k and v.
        head_dim: Channels per head.
        pattern: The pattern.
        layout: The tokens.
        masked: Whether there is a key mask.
    """
    own = EIGHT_HOPPER.get(head_dim)
    if own is not None and not masked and hopper_config(architecture, dtype, head_dim, pattern, layout) is not None:
        return own
    rows = EIGHT[family(architecture)]
    return rows[min(d for d in rows if d >= head_dim)]


def fits_8bit(problem: Problem, architecture: int, interpreted: bool) -> Support:
    """Whether the kernels of 8 bits run a call that those along lists run.

    Args:
        problem: The call.
        architecture: Compute capability times ten.
        interpreted: Whether Triton interprets kernels.
    """
    largest = max(EIGHT[family(architecture)])
    if problem.rpb:
        return Support(False, f"in {problem.precision} it adds no relative position bias")
    if not SMALLEST <= problem.head_dim <= largest:
        return Support(False, f"in {problem.precision} it takes head dims from {SMALLEST} to {largest}")
    if isinstance(problem.pattern, RoutedPattern) and problem.pattern.pools_rest:
        return Support(False, f"in {problem.precision} it pools no keys of what {problem.pattern.name} leaves out")
    if isinstance(problem.pattern, DynamicPattern) and problem.pattern.skip:
        return Support(False, f"in {problem.precision} it skips nothing of what {problem.pattern.name} lists")
    if problem.precision == "fp8" and not interpreted and architecture < 89:
        return Support(False, f"compute capability {architecture / 10} has no products of fp8: take int8")
    return Support(True)


def attend_8bit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, architecture: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H], None unless the call wants it.

    Args:
        q: Queries [B, S, H, D]; channels are contiguous.
        k: Keys [B, N, Hkv, D], likewise.
        v: Values, likewise.
        call: The call.
        architecture: Compute capability times ten, 0 for the interpreter.
    """
    if call.scale < 0:
        q, call = -q, replace(call, scale=-call.scale)
    # Not before a call: asking what runs here imports no triton.
    from visattn.kernels.triton.eightbit.launch import forward
    from visattn.kernels.triton.prepared import Kernels

    k, v = settled(k, call.key_mask), settled(v, call.key_mask)
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    fp8 = call.precision == "fp8"

    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> dict[str, Config]:
        dim = q.shape[3]
        configs = {d: config(architecture, q.dtype, dim, d) for d in DIRECTIONS}
        own = eight_config(architecture, q.dtype, dim, call.pattern, call.layout, mask is not None or not call.scale)
        return configs | {"forward": own}

    shapes = q.shape, k.shape, q.stride(), k.stride(), v.stride()
    key = attend_8bit, call.pattern, call.layout, call.scale, q.dtype, q.device, shapes, mask is None, fp8
    entry = STORE.find(key)
    if entry is None:
        kept = replace(call, key_mask=None)
        entry = STORE.put(key, Kernels(q, k, v, kept, False, choose, lambda: STORE.weigh(key)), CALL_BYTES)
    kernels: Kernels = entry.value
    # Lists that skip have been refused.
    routed: Any = kernels.lists(q, k, v, mask, False) if isinstance(call.pattern, RoutedPattern) else None
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if call.lse else None
    given = None if mask is None else mask.view(torch.uint8)
    t = Operands(q, k, v, key_mask=given, out=out, lse=lse, routed=routed)
    forward(t, kernels.work(q, k, v), fp8)
    return out, None if lse is None else lse.transpose(1, 2)
