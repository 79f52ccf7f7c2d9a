"""The second branch of each hybrid pattern by kernels: without gradients, joined to the softmax branch in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn.kernels.triton.choosing.choose import Others
from visattn.kernels.triton.hybrid.coarse import add_coarse
from visattn.kernels.triton.hybrid.given import grid_mask, grids, narrow
from visattn.kernels.triton.hybrid.linear import add_all, join_blocks
from visattn.kernels.triton.hybrid.router import Pooled, Routed, pooled
from visattn.layout import Layout
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.sla import SLA
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.hybrid.vsa import VSA
from visattn.patterns.routes import Routes

# Largest number of channels: all features of a token are in the registers of one program.
LARGEST = 128


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
    if not parameters and not isinstance(pattern, SLA2):
        return
    blocks = pattern.blocks(layout.grid)
    grid, mask = (
        (grids((q, k, v), layout), grid_mask(key_mask, layout)) if routed is None else (routed.grid, routed.mask)
    )
    grid = [*grid, *grids((out,), layout)]
    with torch.no_grad():
        if isinstance(pattern, SLA2):
            assert choice is not None
            given = layout, key_mask, scale, parameters
            others, shares = _found(pattern, routed) or _found_by_torch(pattern, q, k, choice, *given)
            join_blocks(grid, mask, others, shares, blocks, pattern.feature)
            return
        own = pattern.own(parameters, q, layout.grid)
        if isinstance(pattern, VSA):
            means = routed and routed.means
            means = means or Pooled(*pooled(pattern, grid[:3], mask, blocks, scale, None))
            add_coarse(grid, blocks, bool(mask), means, own)
        elif choice is None:
            assert isinstance(pattern, SLA)
            add_all(grid, mask, pattern.feature, own)
        else:
            assert isinstance(pattern, SLA)
            others = None if routed is None else routed.others
            if others is None:
                of = pattern.marginal_blocks(q, k, layout, key_mask, scale, choice)
                others = _others(of, q, k)
            grid[2] = grid[2] @ own["weight"].T.to(v.dtype)
            join_blocks(grid, mask, others, [own["bias"].contiguous()], blocks, pattern.feature, bias=True)


def _found(pattern: SLA2, routed: Routed | None) -> tuple[Others, list[torch.Tensor]] | None:
    """What linear attention has, and how much stays of the softmax branch, where the router says it."""
    if routed is None:
        return None
    assert routed.others is not None and routed.odds is not None and routed.own is not None
    if pattern.ratio == "mass":
        return routed.others, [torch.sigmoid(routed.odds.exact)]
    # `SLA2.shares`, but for what odds that are infinite do to it.
    gain, shift = routed.own["ratio"].split(1, 1)
    return routed.others, [torch.mul(gain, routed.odds.finite).add_(shift).sigmoid_(), routed.odds.exact]


def _found_by_torch(
    pattern: SLA2,
    q: torch.Tensor,
    k: torch.Tensor,
    choice: Routes,
    layout: Layout,
    key_mask: torch.Tensor | None,
    scale: float,
    parameters: Mapping[str, torch.Tensor],
) -> tuple[Others, list[torch.Tensor]]:
    """The same where no kernel lists; arguments as of `join`."""
    listed = choice.mask(0, pattern.blocks(layout.grid).columns)
    scores, seen = pattern.router_scores(q, k, layout, key_mask, scale, parameters)
    odds = pattern.odds(scores, seen, listed.to(scores.dtype), layout, key_mask)
    return _others(~listed, q, k), [pattern.shares(odds, q, parameters, layout)]


def _others(of: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Others:
    """Which key blocks count [B, H or 1, rows, columns], as `Routed.others` has it."""
    of = of.expand(len(q), q.shape[2], -1, -1).unflatten(1, (k.shape[2], -1)).flatten(2, 3).flatten(0, 1)
    return Others(of.to(narrow(q.dtype)), of.to(torch.float32))
