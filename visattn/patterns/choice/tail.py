"""What is added to the output behind the softmax over listed tokens: slope, linear and coarse rests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn.layout import Layout
from visattn.operands import repeated, widened
from visattn.patterns.choice.blocks import Blocks, inner, token_blocks
from visattn.patterns.choice.pooling import means
from visattn.patterns.routes import Routes

# Rests that are added behind, and what the engines run in front.
TAILS = {"slope": "mean", "linear": "drop", "coarse": "drop"}
# Keeps the quotient of SLA's linear part finite.
LEAST = 1e-5
# Products of queries with pooled keys that exist at a time.
LOGITS = 2**24


def _grid(x: torch.Tensor, layout: Layout, heads: int, valid: torch.Tensor | None) -> torch.Tensor:
    """Grid tokens for each query head, zeros where they are not valid: [B, H, tokens, D]."""
    own = widened(x[:, inner(layout)])
    if valid is not None:
        own = own.masked_fill(~valid[..., None, None], 0)
    return repeated(own.transpose(1, 2), heads, 1)


def slope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    choice: Routes,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """How the values of pooled keys change with their tokens, on average over all blocks (PISA): [B, tokens, H, D].

    The share of a query's weight that falls on pooled keys, times scale / tokens, times q . sum (k - mean k) v^T over
    all tokens and the means of their blocks.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values, alike.
        lse: Log-sum-exp of the softmax with pooled keys [B, S, H].
        choice: Key blocks of each query block.
        layout: The tokens.
        blocks: The blocks of the grid.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits.
    """
    at, heads = inner(layout), q.shape[2]
    valid = None if key_mask is None else key_mask[:, at]
    grid, box = blocks.sides[1]
    mean, count = means(widened(k[:, at]), grid, box, 1, valid)
    rows, columns = (token_blocks(blocks.grid, sides, q.device) for sides in (blocks.queries, blocks.keys))
    pooled = repeated(mean[:, :, 0].transpose(1, 2), heads, 1)
    keys, values = (_grid(x, layout, heads, valid) for x in (k, v))
    off = keys - pooled[:, :, columns]
    if valid is not None:
        off = off.masked_fill(~valid[:, None, :, None], 0)
    moment = off.transpose(2, 3) @ values
    queries = widened(q[:, at]).transpose(1, 2)
    listed, sums = choice.mask(0, blocks.columns), lse[:, at].transpose(1, 2)[..., None].nan_to_num(neginf=0.0)
    empty, weight = (count[:, None, None, :, 0] == 0), count[:, None, None, :, 0].clamp(min=1).log()
    shares, step = [], max(1, LOGITS // (len(q) * heads * blocks.columns))
    for some in (slice(start, start + step) for start in range(0, len(rows), step)):
        extra = torch.exp(queries[:, :, some] @ pooled.transpose(2, 3) * scale + weight - sums[:, :, some])
        # Where everything is listed, no weight falls on pooled keys.
        shares.append(extra.masked_fill(listed[:, :, rows[some]] | empty, 0).sum(-1, keepdim=True))
    number = count.sum(1)[:, None, None].clamp(min=1)
    return (torch.cat(shares, 2) * scale / number * (queries @ moment)).transpose(1, 2)


def linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Linear attention over all grid keys behind a learned map of channels (SLA): [B, tokens, H, D].

    Features are the softmax over channels. Parameters `weight` [D, D] and `bias` [D] map what comes out.
    """
    at, heads = inner(layout), q.shape[2]
    valid = None if key_mask is None else key_mask[:, at]
    queries = widened(q[:, at]).softmax(-1).transpose(1, 2)
    keys = _grid(widened(k).softmax(-1), layout, heads, valid)
    found = queries @ (keys.transpose(2, 3) @ _grid(v, layout, heads, valid))
    found = found / (LEAST + queries @ keys.sum(2)[..., None])
    weight, bias = (parameters[name].to(found.dtype) for name in ("weight", "bias"))
    return (found @ weight.T + bias).transpose(1, 2)


def coarse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention of the means of blocks, the same for all queries of a block (VSA): [B, tokens, H, D]."""
    at, heads = inner(layout), q.shape[2]
    valid = None if key_mask is None else key_mask[:, at]
    query, _ = means(widened(q[:, at]), *blocks.sides[0], 1, valid)
    (keys, count), (values, _) = (means(widened(x[:, at]), *blocks.sides[1], 1, valid) for x in (k, v))
    pooled = [x[:, :, 0].transpose(1, 2) for x in (query, keys, values)]
    pooled[1:] = [repeated(x, heads, 1) for x in pooled[1:]]
    logits = pooled[0] @ pooled[1].transpose(2, 3) * scale
    empty = (count[:, None, None, :, 0] == 0).expand(logits.shape)
    blind = empty.all(-1, keepdim=True)
    weights = logits.masked_fill(empty & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0)
    rows = token_blocks(blocks.grid, blocks.queries, q.device)
    return (weights @ pooled[2])[:, :, rows].transpose(1, 2)
