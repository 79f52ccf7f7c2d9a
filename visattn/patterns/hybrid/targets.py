"""What routers learn from: the exact attention of each pair of blocks, and how far a router's scores are from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn.layout import Layout
from visattn.operands import repeated, widened
from visattn.patterns.choice.blocks import Blocks, inner
from visattn.patterns.choice.picks import Seen
from visattn.patterns.gate import Gate
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.parts import block_weights, slots, valid_of
from visattn.patterns.hybrid.sla2 import SLA2

# Attention weights at a time.
PAIRS = 2**26
POOLS = ("sum", "max")


@torch.no_grad()
def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    pool: str = "sum",
    some: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention of grid queries to grid keys, pooled to pairs of blocks: [B, H, rows, columns].

    Every row adds up to 1 (0 for a query block without valid tokens). Time is that of dense attention, memory that of
    the result and of a few query blocks at a time.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        layout: The tokens; dense ones are left out.
        blocks: The blocks.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits, D**-0.5 if None.
        pool: "sum" for the mass of a block, a mean over queries of sums over keys (SLA2); "max" for its largest
            weight, divided by the row's sum (SeerAttention).
        some: Which query blocks, None for all.

    Raises:
        ValueError: If there is no such pool.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} must be sum or max")
    scale, at, heads = float(q.shape[3] ** -0.5 if scale is None else scale), inner(layout), q.shape[2]
    valid = valid_of(key_mask, layout)
    (rows, in_row), (columns, in_column) = (slots(*side, q.device) for side in blocks.sides)
    if some is not None:
        rows, in_row = rows[some], in_row[some]
    queries = widened(q[:, at]).transpose(1, 2)
    keys = repeated(widened(k[:, at]), heads).permute(0, 2, 3, 1)
    asks = in_row[None] if valid is None else in_row & valid[:, rows]
    step = max(1, PAIRS // (len(q) * heads * layout.tokens * rows.shape[1]))
    found = []
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        logits = scale * queries[:, :, rows[part].flatten()] @ keys
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)[..., columns] * in_column
        weights = (weights.sum(-1) if pool == "sum" else weights.amax(-1)).unflatten(2, (-1, rows.shape[1]))
        mine = asks[:, None, part, :, None].to(weights.dtype)
        found.append((weights * mine).sum(3) if pool == "sum" else (weights * mine).amax(3))
    pooled = torch.cat(found, 2)
    return pooled / pooled.sum(-1, keepdim=True).clamp_min(torch.finfo(pooled.dtype).tiny)


def router_losses(
    pattern: Gate | HybridPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    parameters: Mapping[str, torch.Tensor],
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    temperature: float = 1.0,
    target: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """How far a router is from the exact attention of pairs of blocks: differentiable numbers by name.

    "router" is the mean over heads and query blocks of KL(exact || softmax(scores)), with both sides' logarithms
    divided by `temperature`. The scores of sla2 count by the tokens of their blocks, as its ratio takes them. "ratio",
    of `sla2(ratio=learned)` alone, is the mean KL between a, which mixes the two branches, and the exact mass of what
    is listed. Gradients reach the parameters, and q and k if those ask for it: detach them where only the router
    learns.

    Args:
        pattern: Whose scores: `sla2`, `gate`; of `sla` and `vsa` they have no parameters, and train q and k.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        layout: The tokens.
        parameters: What is learned.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits, D**-0.5 if None.
        temperature: Above 1 softens both sides.
        target: What `block_attention` gave, by "max" for a gate and by "sum" for the others; None to compute it.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    blocks = (pattern.by if isinstance(pattern, Gate) else pattern).blocks(layout.grid)
    if target is None:
        pool = "max" if isinstance(pattern, Gate) else "sum"
        target = block_attention(q, k, layout, blocks, key_mask, scale, pool)
    if isinstance(pattern, Gate):
        scores, seen = pattern.scores(q, k, layout, key_mask, parameters)
        return {"router": divergence(scores, target, seen, temperature)}
    scores, seen = pattern.router_scores(q, k, layout, key_mask, scale, parameters)
    counted = by_tokens(scores, blocks, layout, key_mask)
    found = {"router": divergence(counted, target, seen, temperature)}
    if isinstance(pattern, SLA2) and pattern.ratio == "learned":
        found["ratio"] = _ratio_loss(pattern, scores, seen, target, q, layout, key_mask, parameters)
    return found


def by_tokens(scores: torch.Tensor, blocks: Blocks, layout: Layout, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Scores of pairs of blocks [B, H, rows, columns] whose softmax counts a key block by its tokens."""
    number = block_weights(blocks, valid_of(key_mask, layout), scores.device)[:, None, None]
    return scores + number.clamp(min=1).to(scores.dtype).log()


def divergence(scores: torch.Tensor, target: torch.Tensor, seen: Seen, temperature: float) -> torch.Tensor:
    """Mean over heads and query blocks of KL(target || softmax(scores)), both logarithms divided by `temperature`."""
    if seen.columns is not None:
        scores = scores.masked_fill(~seen.columns[:, None, None], torch.finfo(scores.dtype).min)
    logs = (scores / temperature).log_softmax(-1)
    truth = target.to(scores.dtype)
    if temperature != 1:
        truth = truth.clamp_min(torch.finfo(truth.dtype).tiny).pow(1 / temperature)
        truth = truth / truth.sum(-1, keepdim=True)
    found = (torch.xlogy(truth, truth) - truth * logs.masked_fill(truth == 0, 0)).sum(-1)
    return _mean(found, seen)


def _mean(found: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Mean over the query blocks that take part [B, H, rows]."""
    if seen.rows is None:
        return found.mean()
    there = seen.rows[:, None].expand(found.shape)
    return found.masked_fill(~there, 0).sum() / there.sum().clamp(min=1)


def _ratio_loss(
    pattern: SLA2,
    scores: torch.Tensor,
    seen: Seen,
    target: torch.Tensor,
    q: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Mean KL of the two shares."""
    blocks = pattern.blocks(layout.grid)
    listed = pattern.front.pick(scores.detach(), seen, blocks).mask(0, blocks.columns).to(scores.dtype)
    odds = pattern.odds(scores, seen, listed, layout, key_mask)
    tiny = torch.finfo(scores.dtype).eps
    share = pattern.shares(odds, q, parameters, layout).clamp(tiny, 1 - tiny)
    mass = (target.to(scores.dtype) * listed).sum(-1).clamp(0, 1)
    found = torch.xlogy(mass, mass) + torch.xlogy(1 - mass, 1 - mass)
    return _mean(found - mass * share.log() - (1 - mass) * (1 - share).log(), seen)
