"""Attention inside clusters of equal size: queries and keys are gathered around each centroid."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.dispatch import Backend, overhead
from visattn.kernels.agent.attention import attend
from visattn.kernels.choosing import on_every_token
from visattn.operands import repeated, widened
from visattn.patterns import Centroids
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.listening import choosing
from visattn.problem import Call, OtherKind, Problem, Support

# Added to the number of centroids that took a query, as in the original.
EPSILON = 1e-5
# Pairs of dense attention that finding the nearest tokens costs a CPU for each token and head.
TOKEN = 1000.0


class CentroidsBackend(Backend):
    """Runs clusters around trained centroids, and nothing else; all others leave them to it."""

    name: ClassVar[str] = "centroids"

    def available(self) -> Support:
        """Always: torch's own attention is all it needs."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Such clusters without log-sum-exp."""
        if not isinstance(problem.pattern, Centroids):
            return OtherKind(False, f"it runs clusters around trained centroids only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "the mean of several attentions has no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The pairs of every cluster."""
        pattern, layout = problem.pattern, problem.layout
        assert isinstance(pattern, Centroids)
        number = min(pattern.window, layout.tokens)
        pairs = pattern.clusters * number * (number + layout.length - layout.tokens)
        found = on_every_token(problem, TOKEN) + overhead(problem, 1.0, 500)
        return float(problem.batch * problem.heads * pairs) + found

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern, layout = call.pattern, call.layout
        assert isinstance(pattern, Centroids)
        at, heads = inner(layout), q.shape[2]
        k, v = (repeated(t, heads) for t in (k, v))
        with choosing():
            rows, columns = _taken(q, k, call)
        queries = _gathered(q[:, at], rows)
        keys, values = (torch.cat([_gathered(t[:, at], columns), _dense(t, at, rows)], 3) for t in (k, v))
        mask, alive = _shown(call, columns)
        queries, keys, values = (t.flatten(0, 2)[:, None] for t in (queries, keys, values))
        own = attend(queries, keys, values, mask, call.scale)
        own = own[:, 0].unflatten(0, rows.shape[:3])
        own = own if alive is None else own.masked_fill(~alive[..., None], 0)
        wide = widened(own).flatten(2, 3)
        index = rows.flatten(2)[..., None]
        total = wide.new_zeros(*wide.shape[:2], layout.tokens, wide.shape[3])
        total = total.scatter_add(2, index.expand_as(wide), wide)
        number = wide.new_zeros(*total.shape[:3], 1).scatter_add(2, index, torch.ones_like(wide[..., :1]))
        grid = (total / (number + EPSILON)).to(q.dtype).transpose(1, 2)
        if layout.tokens == layout.length:
            return grid, None
        text = [q[:, : at.start], q[:, at.stop :]]
        of_text = _of_dense(torch.cat(text, 1), k, v, call)
        return torch.cat([of_text[:, : at.start], grid, of_text[:, at.start :]], 1), None


def centroid_rows(q: torch.Tensor, k: torch.Tensor, call: Call, index: torch.Tensor) -> torch.Tensor:
    """The weights with which chosen queries read all tokens, which sum up to less than 1: [B, H, R, S].

    Args:
        q: Queries [B, S, H, D], float32 at least.
        k: Keys [B, S, Hkv, D].
        call: The call.
        index: Tokens [R].
    """
    at, (batch, length, heads, _) = inner(call.layout), q.shape
    k = repeated(k, heads)
    logits = torch.einsum("brhd,bshd->bhrs", q[:, index], k) * call.scale
    shown = torch.ones(batch, length, dtype=torch.bool, device=q.device) if call.key_mask is None else call.key_mask
    rows, columns = (_members(x, length, at) for x in _taken(q, k, call))
    total, number = torch.zeros_like(logits), torch.zeros_like(logits[..., :1])
    text = torch.ones(length, dtype=torch.bool, device=q.device)
    text[at] = False
    for row, column in zip(rows.unbind(2), columns.unbind(2), strict=True):
        own = _softmax(logits, ((column | text) & shown[:, None])[:, :, None])
        took = row[:, :, index, None]
        total, number = total + own * took, number + took
    of_text = _softmax(logits, shown[:, None, None])
    return torch.where(text[index][:, None], of_text, total / (number + EPSILON))


def _members(index: torch.Tensor, length: int, at: slice) -> torch.Tensor:
    """Which tokens are of each cluster: bool [B, H, clusters, S]."""
    found = torch.zeros(*index.shape[:3], length, dtype=torch.bool, device=index.device)
    return found.scatter(3, index + at.start, torch.ones_like(index, dtype=torch.bool))


def _softmax(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over what is seen, zeros where nothing is."""
    return logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)


def _taken(q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid queries and keys that each centroid takes: int64 [B, H, clusters, window].

    Raises:
        ValueError: If there are no centroids.
    """
    pattern, centroids = call.pattern, call.parameters.get("centroids")
    assert isinstance(pattern, Centroids)
    if centroids is None:
        raise ValueError(
            f"{pattern} gathers tokens around trained centroids, and they are missing: pass parameters= or "
            "apply(..., weights=) with a file that holds them"
        )
    queries, keys = (pattern.taken(x, call.layout, centroids, call.key_mask) for x in (q, k))
    return queries, keys


def _gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Grid tokens [B, tokens, H, D] of each cluster [B, H, clusters, window]: [B, H, clusters, window, D]."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.transpose(1, 2).gather(2, flat).unflatten(2, index.shape[2:])


def _dense(x: torch.Tensor, at: slice, index: torch.Tensor) -> torch.Tensor:
    """Dense tokens [B, S, H, D] beside every cluster: [B, H, clusters, dense, D]."""
    own = torch.cat([x[:, : at.start], x[:, at.stop :]], 1).transpose(1, 2)[:, :, None]
    return own.expand(-1, -1, index.shape[2], -1, -1)


def _shown(call: Call, columns: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which keys of each cluster are valid: bool [B H clusters, 1, 1, keys], and which clusters have one [B, H, c, 1].

    A cluster without any sees all and is to be blanked: no row of the softmax is empty.
    """
    if call.key_mask is None:
        return None, None
    at, mask = inner(call.layout), call.key_mask
    valid = mask[:, None, at].expand(-1, columns.shape[1], -1).gather(2, columns.flatten(2)).view_as(columns)
    dense = torch.cat([mask[:, : at.start], mask[:, at.stop :]], 1)[:, None, None]
    valid = torch.cat([valid, dense.expand(*valid.shape[:3], -1)], 3)
    alive = valid.any(-1, keepdim=True)
    return (valid | ~alive).flatten(0, 2)[:, None, None], alive


def _of_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """What dense queries read, who see everything: [B, dense, H, D]."""
    mask = alive = None
    if call.key_mask is not None:
        alive = call.key_mask.any(1)[:, None, None, None]
        mask = call.key_mask[:, None, None] | ~alive
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
    out = attend(queries, keys, values, mask, call.scale)
    return (out if alive is None else out.masked_fill(~alive, 0)).transpose(1, 2)


backend = CentroidsBackend()
