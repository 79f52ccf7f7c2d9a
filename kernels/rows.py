"""The weights with which chosen queries read all tokens, for any pattern: what attention-map losses compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from visattn.autocast import switched_off
from visattn.checks import check_call, factor, row_tensor
from visattn.given import mapping, said
from visattn.kernels.agent.attention import pool_queries
from visattn.kernels.centroids import centroid_rows
from visattn.kernels.clipped import clipped
from visattn.kernels.hybrid.rows import hybrid_rows
from visattn.kernels.linear.causal import causal_factors
from visattn.kernels.linear.features import elu_plus_one, features, repeated, widened
from visattn.kernels.linear.flow import flow_weights
from visattn.kernels.linear.mala import mala_weights
from visattn.kernels.linear.wersa import wersa_features
from visattn.kernels.ordered import ordered_rows
from visattn.kernels.wrapped import gates, query_factors
from visattn.layout import Layout
from visattn.patterns import (
    Agent,
    Best,
    Centroids,
    Clipped,
    DynamicPattern,
    Flow,
    Gate,
    Gated,
    HybridPattern,
    Linear,
    ListedPattern,
    Mala,
    MergingPattern,
    OrderedPattern,
    Pattern,
    PerHead,
    PooledPattern,
    RoutedPattern,
    SharingPattern,
    Sigmoid,
    SparseLinear,
    Wersa,
    Wrapped,
    parse,
)
from visattn.patterns.choice.blocks import token_blocks
from visattn.patterns.kinds import with_pooled_keys
from visattn.patterns.tailed import holding
from visattn.plans import TilePlan, plan, with_routes
from visattn.problem import Call


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    rows: torch.Tensor | Sequence[int],
    *,
    parameters: Mapping[str, torch.Tensor] | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of every token in the output of chosen queries: attention(q, k, v, ...)[:, rows] = weights v.

    Weights of pooled keys (clear) and of agents are passed on to the tokens they stand for. Rows of softmax, linear,
    flow-free mixes of them and agent sum to 1; those of sigmoid, clipped and flow do not, and mala's may be negative.
    Differentiable in q, k and the parameters. Memory is that of the result.

    Args:
        q: Queries [B, S, H, D] with S = layout.length.
        k: Keys [B, S, Hkv, D].
        pattern: A pattern or its text.
        layout: Where the tokens sit.
        rows: Tokens whose queries are asked for: whole numbers [R]; those of a tensor on a GPU are taken as they are.
        parameters: Learnable parameters, as for `attention`.
        scale: Factor on the logits, D**-0.5 if None.
        key_mask: bool [B, S], True where a key may be attended.

    Returns:
        [B, H, R, S] in float32 (float64 for float64 inputs); zeros for a query that sees nothing.

    Raises:
        ValueError: If the arguments do not fit together, a row is no token, or the pattern merges tokens.
    """
    pattern, given = parse(pattern), row_tensor(rows)
    parameters = {} if parameters is None else mapping(parameters, "parameters", "from their names to tensors")
    check_call(q, k, k, pattern, layout, key_mask, None, parameters)
    if isinstance(pattern, MergingPattern):
        raise ValueError(f"{pattern} merges tokens before they become queries and keys: it has no rows of its own")
    # Looking at rows that are on a GPU would wait for all that it has to do: a loss asks for them at every layer.
    inside = given.is_cuda or not given.numel() or 0 <= given.min() <= given.max() < q.shape[1]
    if given.ndim != 1 or not inside:
        raise ValueError(f"rows={said(rows)} must be whole numbers [R] from 0 to {q.shape[1] - 1}")
    index = given.to(q.device)
    call = Call(pattern, layout, factor(scale, q.shape[3]), key_mask, parameters=parameters)
    if not q.shape[0]:
        return _products(widened(q)[:, index], widened(k))
    # Rows are float32 at least, under autocast too.
    with switched_off(q.device):
        return _rows(widened(q), widened(k), call, index)


def _rows(q: torch.Tensor, k: torch.Tensor, call: Call, index: torch.Tensor) -> torch.Tensor:
    """The rows of checked arguments."""
    pattern = call.pattern
    if isinstance(pattern, Agent):
        return _agent(q, k, call, index)
    if isinstance(pattern, Mala):
        return mala_weights(elu_plus_one(q)[:, index], elu_plus_one(k), call.scale, call.key_mask)
    if isinstance(pattern, Flow):
        return flow_weights(q, k, index, call.key_mask)
    if isinstance(pattern, Wersa):
        mapped = wersa_features(q, k, pattern, call.layout, call.parameters, call.key_mask)
        return _normalised(_products(mapped[0][:, index], mapped[1]))
    if isinstance(pattern, Linear):
        return _linear(q, k, pattern.feature, call, index, None)
    if isinstance(pattern, SparseLinear):
        return _sparse_linear(q, k, pattern, call, index)
    if isinstance(pattern, DynamicPattern) and not pattern.of_products:
        raise ValueError(f"{pattern} adds something to its output that is no weight of a token: rest=mean has rows")
    if isinstance(pattern, HybridPattern):
        return hybrid_rows(q, k, call, index, lambda own: _rows(q, k, own, index))
    if isinstance(pattern, Gate):
        with holding(pattern.by, pattern.choose(q, k, call.layout, call.key_mask, call.parameters)):
            return _rows(q, k, replace(call, pattern=pattern.by, parameters={}), index)
    if isinstance(pattern, Wrapped):
        return _wrapped(q, k, pattern, call, index)
    if isinstance(pattern, PerHead):
        return _perhead(q, k, pattern, call, index)
    if isinstance(pattern, OrderedPattern):
        return ordered_rows(q, k, call, index)
    if isinstance(pattern, Centroids):
        return centroid_rows(q, k, call, index)
    if isinstance(pattern, SharingPattern):
        raise ValueError(
            f"{pattern} takes from what an earlier step kept, which is no weight of a token: ask for the rows of "
            f"{pattern.of}"
        )
    if isinstance(pattern, Best):
        raise ValueError(f"{pattern} chooses by outputs, and rows have no values: ask for the rows of its patterns")
    return _listed(q, k, call, index)


def _wrapped(q: torch.Tensor, k: torch.Tensor, pattern: Wrapped, call: Call, index: torch.Tensor) -> torch.Tensor:
    """The rows of the pattern inside, of queries and with gates as they are there."""
    own = replace(call, pattern=pattern.of, parameters=pattern.inner_parameters(call.parameters))
    if isinstance(pattern, Gated):
        factors = gates(q[:, index], pattern, call.parameters)[..., 0].transpose(1, 2)
        return _rows(q, k, own, index) * factors[..., None]
    if any(name.startswith("value") for name in call.parameters):
        raise ValueError(f"{pattern} scales values by what they are, and rows have none: leave values out of it")
    keys = k.shape[1] if call.key_mask is None else call.key_mask.sum(1)
    return _rows(q * query_factors(q, keys, call.parameters), k, own, index)


def _perhead(q: torch.Tensor, k: torch.Tensor, pattern: PerHead, call: Call, index: torch.Tensor) -> torch.Tensor:
    """The rows of each head's pattern."""
    of_heads = pattern.of_heads(q.shape[2])
    found = {each: _rows(q, k, replace(call, pattern=each), index) for each in dict.fromkeys(of_heads)}
    return torch.stack([found[each][:, head] for head, each in enumerate(of_heads)], 1)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """All products: [B, R, H, D] and [B, N, Hkv, D] -> [B, H, R, N]."""
    return torch.einsum("brhd,bshd->bhrs", q, repeated(k, q.shape[2]))


def _softmax(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the visible keys, zeros where there are none."""
    empty = ~seen.any(-1, keepdim=True)
    return logits.masked_fill(~seen, float("-inf")).masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _shown(key_mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The key mask as [1 or B, 1, 1, S]."""
    if key_mask is None:
        return torch.ones(1, 1, 1, like.shape[1], dtype=torch.bool, device=like.device)
    return key_mask[:, None, None, :]


def _agent(q: torch.Tensor, k: torch.Tensor, call: Call, rows: torch.Tensor) -> torch.Tensor:
    assert isinstance(call.pattern, Agent)
    agents, there = pool_queries(q, call.pattern, call.layout, call.key_mask)
    gather = _softmax(_products(agents, k) * call.scale, _shown(call.key_mask, k))
    return _softmax(_products(q[:, rows], agents) * call.scale, _shown(there, agents)) @ gather


def _linear(
    q: torch.Tensor, k: torch.Tensor, feature: str, call: Call, rows: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    mapped_q, mapped_k = features(q, k, feature, call.parameters, call.key_mask)
    weights = _products(mapped_q[:, rows], mapped_k)
    if isinstance(call.pattern, Linear) and call.pattern.causal:
        weights = weights * causal_factors(call.pattern, call.layout, q.shape[2], rows, weights)
    if hidden is not None:
        weights = weights * hidden
    return _normalised(weights)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    """Weights over their sums, zeros where there are none."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total < torch.finfo(total.dtype).tiny, 1)


def _sparse_linear(
    q: torch.Tensor, k: torch.Tensor, pattern: SparseLinear, call: Call, rows: torch.Tensor
) -> torch.Tensor:
    soft = _listed(q, k, Call(pattern.sparse, call.layout, call.scale, call.key_mask, parameters=call.parameters), rows)
    mix = call.parameters.get("mix")
    if mix is None:
        return soft
    seen = visible_rows(pattern.sparse, call.layout, rows, q, k, call.key_mask)[..., : q.shape[1]]
    hidden = ~seen & _shown(call.key_mask, k)
    linear = _linear(q, k, pattern.feature, call, rows, hidden)
    return soft + mix.to(soft.dtype)[:, None, None] * hidden.any(-1, keepdim=True) * (linear - soft)


def _listed(q: torch.Tensor, k: torch.Tensor, call: Call, rows: torch.Tensor) -> torch.Tensor:
    """Softmax, clipped or not, or sigmoid over the visible keys, those that a pattern appends included."""
    pattern, pool = call.pattern, call.parameters.get("pool_weight")
    listed = pattern.sparse if isinstance(pattern, Sigmoid | Clipped) else pattern
    assert isinstance(listed, ListedPattern)
    if isinstance(listed, DynamicPattern) and listed.pools_rest:
        return _with_rest(q, k, listed, call, rows)
    keys, _, key_mask = with_pooled_keys(listed, k, k, call.key_mask, call.layout, pool)
    seen = visible_rows(listed, call.layout, rows, q, k, call.key_mask, call.scale) & _shown(key_mask, keys)
    logits = _products(q[:, rows], keys) * call.scale
    if isinstance(pattern, Sigmoid):
        offset = call.parameters.get("bias")
        if offset is not None:
            logits = logits + offset.to(logits.dtype)[:, None, None]
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype)
        logits = logits + (-count.log() if pattern.bias is None else pattern.bias)
        weights = logits.sigmoid() * seen
    else:
        weights = _softmax(logits, seen)
        if isinstance(pattern, Clipped):
            weights = clipped(weights, seen, pattern) * seen
    return _unpooled(weights, listed, call, pool)


def _with_rest(
    q: torch.Tensor, k: torch.Tensor, pattern: DynamicPattern, call: Call, rows: torch.Tensor
) -> torch.Tensor:
    """Softmax over what a dynamic pattern lists and a pooled key of each other block, whose weight its tokens share."""
    layout, blocks = call.layout, pattern.blocks(call.layout.grid)
    own = visible_rows(pattern, layout, rows, q, k, call.key_mask, call.scale)
    pooled = pattern.pooled(k, k, layout, call.key_mask)
    block = token_blocks(blocks.grid, blocks.keys, q.device)
    first = torch.zeros(blocks.columns, dtype=torch.int64, device=q.device)
    first = first.scatter(0, block.flip(0), torch.arange(layout.tokens - 1, -1, -1, device=q.device)) + layout.prefix
    # A block is listed where any of its tokens is, and dense queries list all.
    rest = ~own[..., first] & pooled.weight.isfinite()[:, None, None]
    weight = pooled.weight.masked_fill(pooled.weight.isinf(), 0)
    logits = _products(q[:, rows], pooled.k) * call.scale
    logits = logits + torch.nn.functional.pad(weight, (layout.length, 0))[:, None, None]
    weights = _softmax(logits, torch.cat([own & _shown(call.key_mask, k), rest], 3))
    share = weights[..., layout.length :] * (-weight).exp()[:, None, None]
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    shared = share[..., block] * _shown(call.key_mask, k)[..., inner]
    return weights[..., : layout.length] + torch.nn.functional.pad(shared, (layout.prefix, layout.suffix))


def _unpooled(weights: torch.Tensor, pattern: Pattern, call: Call, pool: torch.Tensor | None) -> torch.Tensor:
    """Weights [.., S + extra] with those of pooled keys passed on to their tokens: [.., S]."""
    layout = call.layout.keys
    cell = pattern.pool_shape(layout.grid) if isinstance(pattern, PooledPattern) else None
    own, pooled = weights[..., : layout.length], weights[..., layout.length :]
    if cell is None:
        return own
    where = np.indices(layout.grid).reshape(layout.dims, -1)
    sides = [-(-n // c) for n, c in zip(layout.grid, cell, strict=True)]
    cells = torch.from_numpy(np.ravel_multi_index([w // c for w, c in zip(where, cell, strict=True)], sides))
    slots = torch.from_numpy(np.ravel_multi_index([w % c for w, c in zip(where, cell, strict=True)], cell))
    cells, slots = cells.to(weights.device), slots.to(weights.device)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    keep = torch.ones(1, layout.tokens, device=weights.device, dtype=weights.dtype)
    if call.key_mask is not None:
        keep = call.key_mask[:, inner].to(weights.dtype)
    count = keep.new_zeros(len(keep), math.prod(sides)).index_add(1, cells, keep).clamp(min=1)
    share = keep * math.prod(cell) / count[:, cells]
    share = share / math.prod(cell) if pool is None else share * pool.to(share.dtype).flatten()[slots]
    added = pooled[..., cells] * share[:, None, None]
    return own + torch.nn.functional.pad(added, (layout.prefix, layout.suffix))


def visible_rows(
    pattern: ListedPattern,
    layout: Layout,
    rows: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Which keys chosen queries see by a pattern that is a list of key tiles.

    Args:
        pattern: The pattern.
        layout: The tokens.
        rows: Tokens [R].
        q: Queries [B, S, H, D] and
        k: keys [B, S, Hkv, D] and
        key_mask: which are valid, bool [B, S]: used by routed patterns only.
        scale: Factor on the logits, for routed patterns; D**-0.5 if None.

    Returns:
        bool [1 or B, 1 or H, R, S + extra].
    """
    if pattern.covers(*layout.grids):
        return torch.ones(1, 1, len(rows), layout.keys.length, dtype=torch.bool, device=q.device)
    made, wanted = plan(pattern, layout), rows.cpu().numpy()
    if not isinstance(pattern, RoutedPattern):
        return torch.from_numpy(_plan_rows(made, wanted)[None, None]).to(q.device)
    routes = pattern.route(q, k, made, key_mask, scale)
    samples, groups = routes.tiles.shape[:2]
    found = [
        np.stack([_plan_rows(with_routes(made, routes, sample, group), wanted) for group in range(groups)])
        for sample in range(samples)
    ]
    return torch.from_numpy(np.stack(found)).to(q.device)


def _plan_rows(made: TilePlan, rows: np.ndarray) -> np.ndarray:
    """Rows of the mask that a plan stands for: bool [R, keys]."""
    tile, slot = np.empty(made.queries.length, np.int64), np.empty(made.queries.length, np.int64)
    where = np.nonzero(made.queries.tokens >= 0)
    tokens = made.queries.tokens[where]
    tile[tokens], slot[tokens] = where
    seen = np.zeros((len(rows), made.keys.length), bool)
    for out, row in zip(seen, rows, strict=True):
        entries = slice(made.lists.start[tile[row]], made.lists.start[tile[row] + 1])
        keys, mask = made.keys.tokens[made.lists.tile[entries]], made.lists.mask[entries]
        shown = keys >= 0
        shown[mask >= 0] &= made.masks[mask[mask >= 0], slot[row]]
        out[keys[shown]] = True
    return seen
