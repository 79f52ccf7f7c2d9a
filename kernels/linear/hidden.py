"""Linear attention of each query over the keys that a sparse pattern hides from it, a few query tiles at a time."""

from __future__ import annotations

import numpy as np
import torch

from visattn.kernels.linear.features import features
from visattn.kernels.linear.plain import divided
from visattn.kernels.plan_chunks import Chunk, plan_tables, run_chunks, tiled
from visattn.operands import repeated, wants_gradient, widened
from visattn.patterns import SparseLinear
from visattn.plans import TilePlan, plan
from visattn.problem import Call


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
    hidden = _HiddenTiles(made, tables.key_tokens, call.key_mask)
    states = hidden.states(mapped_k, values)

    def compute(chunk: Chunk) -> torch.Tensor:
        tiles = hidden.of(chunk).to(states.dtype)
        queries = tiled(mapped_q, chunk.queries).unflatten(1, (heads, -1))
        state = torch.einsum("ct,bhtx->bhcx", tiles, states.flatten(3)).unflatten(3, states.shape[3:])
        product = queries @ state[:, :, None]
        weights = queries @ tiled(mapped_k, chunk.keys)[:, :, None].transpose(-1, -2)
        product = product + (weights * hidden.left(chunk)[:, None, None]) @ tiled(values, chunk.keys)[:, :, None]
        return product.flatten(1, 2).permute(0, 2, 3, 1, 4)

    grad = wants_gradient(mapped_q, mapped_k, values)
    fixed = states.shape[3] * states.shape[4]
    read = (mapped_q, mapped_k, values, states, call.key_mask) if grad else None
    product = run_chunks(made, tables, len(q) * q.shape[2], compute, read, fixed)
    return divided(product[..., :-1], product[..., -1]), run_chunks(made, tables, len(q), hidden.any, None)


class _HiddenTiles:
    """The keys that the lists of a plan leave out.

    Args:
        made: The plan.
        key_tokens: Token of each slot of its key tiles, -1 for none.
        key_mask: bool [B, S], or None.
    """

    def __init__(self, made: TilePlan, key_tokens: torch.Tensor, key_mask: torch.Tensor | None) -> None:
        self._lists, self._tiles, self._key_mask = made.lists, made.keys.tiles, key_mask
        # Without the tiles of pooled keys.
        self._tokens = key_tokens[: made.keys.tiles - made.keys.runs[3]]
        self._slots = self._tokens.clamp(min=0)
        there = (self._tokens >= 0)[None]
        self._there = there if key_mask is None else there & key_mask[:, self._slots]

    def states(self, mapped: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sum of features times values of each key tile: [B, H, tiles, F, D + 1]."""
        keys = tiled(mapped, self._slots) * self._there[:, None, ..., None].to(mapped.dtype)
        return keys.transpose(-1, -2) @ tiled(values, self._slots)

    def of(self, chunk: Chunk) -> torch.Tensor:
        """Whether each query tile of a chunk visits none of each key tile: bool [c, tiles]."""
        hidden = np.ones((len(chunk.rows), self._tiles), bool)
        for i, row in enumerate(chunk.rows.tolist()):
            hidden[i, self._lists.tile[self._lists.start[row] : self._lists.start[row + 1]]] = False
        return torch.from_numpy(hidden[:, : len(self._tokens)]).to(chunk.rows.device)

    def left(self, chunk: Chunk) -> torch.Tensor:
        """The pairs of partly visible tiles that are hidden: bool [1 or B, c, T, m * L]."""
        return chunk.shown(chunk.valid[:, None] & ~chunk.seen, self._key_mask)

    def any(self, chunk: Chunk) -> torch.Tensor:
        """Whether anything is hidden from each query of a chunk: bool [1 or B, c, T]."""
        numbers = self._there.sum(2).float()
        tiles = numbers @ self.of(chunk).to(numbers.dtype).T
        return self.left(chunk).any(-1) | (tiles > 0)[..., None]
