"""Softmax attention over the visible keys and linear attention over the hidden ones, mixed per head."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from visattn.dispatch import Backend, Call, Problem, Support, choose, overhead, run_call
from visattn.kernels.linear.features import features, repeated, widened
from visattn.kernels.linear.plain import divided
from visattn.kernels.plan_chunks import Chunk, plan_tables, run_chunks, tiled
from visattn.patterns import SparseLinear
from visattn.patterns.linear import feature_channels
from visattn.plans import TilePlan, plan

# Time over that of dense attention's products, by operation count.
RATE = 4.0


class SparseLinearBackend(Backend):
    """Runs sparselinear patterns, and nothing else; its softmax part goes to the cheapest other backend."""

    name: ClassVar[str] = "sparse_linear"

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Sparselinear patterns without log-sum-exp."""
        if not isinstance(problem.pattern, SparseLinear):
            return Support(False, f"it runs sparselinear patterns only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "a mix of two attentions has no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The sparse part, the states of tiles and their sums, and the pairs of partly visible tiles."""
        pattern = problem.pattern
        assert isinstance(pattern, SparseLinear)
        sparse = replace(problem, pattern=pattern.sparse)
        made = plan(pattern.sparse, problem.layout)
        channels = feature_channels(pattern.feature, problem.head_dim)
        partial = int((made.lists.mask >= 0).sum()) * made.queries.capacity * made.keys.capacity
        sums = made.queries.tiles * made.keys.tiles * channels / 2
        linear = problem.layout.length * channels + partial + sums
        own = RATE * problem.batch * problem.heads * linear + overhead(problem, cpu_ms=1.0, cuda_us=500)
        return choose(sparse).cost(sparse) + own

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern = call.pattern
        assert isinstance(pattern, SparseLinear)
        sparse, _ = run_call(q, k, v, replace(call, pattern=pattern.sparse))
        mix = call.parameters.get("mix")
        if mix is None:
            return sparse, None
        linear, there = hidden_attention(q, k, v, call)
        share = mix.to(linear.dtype)[:, None] * there[:, :, None, None].to(linear.dtype)
        return (sparse + share * (linear - sparse)).to(q.dtype), None


def hidden_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention of each query over the keys that the sparse pattern hides from it.

    Keys of tiles that no query of a query tile sees enter by their sums, one state [F, D + 1] per key tile; those of
    partly visible tiles one by one.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        call: The call; its pattern is sparselinear.

    Returns:
        [B, S, H, D] in float32 at least, zeros without any such key; and bool [1 or B, S], whether there is one.
    """
    pattern = call.pattern
    assert isinstance(pattern, SparseLinear)
    made = plan(pattern.sparse, call.layout)
    tables = plan_tables(made, q.device, partial=True)
    mapped_q, mapped_k = features(q, k, pattern.feature, call.parameters, call.key_mask)
    heads = mapped_k.shape[2]
    values = repeated(widened(v), heads)
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], -1)
    real = made.keys.tiles - made.keys.runs[3]
    tokens = tables.key_tokens[:real]
    there = (tokens >= 0)[None] if call.key_mask is None else (tokens >= 0) & call.key_mask[:, tokens.clamp(min=0)]
    keys = tiled(mapped_k, tokens.clamp(min=0)) * there[:, None, ..., None].to(mapped_k.dtype)
    states = keys.transpose(-1, -2) @ tiled(values, tokens.clamp(min=0))
    hidden = _HiddenTiles(made, real)

    def compute(chunk: Chunk) -> torch.Tensor:
        tiles = hidden.of(chunk).to(states.dtype)
        queries = tiled(mapped_q, chunk.queries).unflatten(1, (heads, -1))
        state = torch.einsum("ct,bhtx->bhcx", tiles, states.flatten(3)).unflatten(3, states.shape[3:])
        product = queries @ state[:, :, None]
        left = (chunk.valid[:, None] & ~chunk.seen)[None]
        if call.key_mask is not None:
            left = left & call.key_mask[:, chunk.keys][:, :, None]
        weights = queries @ tiled(mapped_k, chunk.keys)[:, :, None].transpose(-1, -2)
        product = product + (weights * left[:, None, None]) @ tiled(values, chunk.keys)[:, :, None]
        return product.flatten(1, 2).permute(0, 2, 3, 1, 4)

    def count(chunk: Chunk) -> torch.Tensor:
        left = (chunk.valid[:, None] & ~chunk.seen)[None]
        if call.key_mask is not None:
            left = left & call.key_mask[:, chunk.keys][:, :, None]
        tiles = there.sum(2).to(states.dtype) @ hidden.of(chunk).to(states.dtype).T
        return left.any(-1) | (tiles > 0)[..., None]

    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (mapped_q, mapped_k, values))
    fixed = states.shape[3] * states.shape[4]
    product = run_chunks(made, tables, len(q) * q.shape[2], compute, grad, fixed)
    return divided(product[..., :-1], product[..., -1]), run_chunks(made, tables, len(q), count, False)


class _HiddenTiles:
    """Which key tiles the lists of a plan leave out."""

    def __init__(self, made: TilePlan, real: int) -> None:
        self.made, self.real = made, real

    def of(self, chunk: Chunk) -> torch.Tensor:
        """Whether each query tile of a chunk visits none of each real key tile: bool [c, tiles]."""
        lists = self.made.lists
        hidden = np.ones((len(chunk.rows), self.made.keys.tiles), bool)
        for i, row in enumerate(chunk.rows.tolist()):
            hidden[i, lists.tile[lists.start[row] : lists.start[row + 1]]] = False
        return torch.from_numpy(hidden[:, : self.real]).to(chunk.rows.device)


backend = SparseLinearBackend()
