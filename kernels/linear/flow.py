"""Flow-Attention: linear attention with competition among keys and allocation to queries."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.operands import repeated, widened

EPSILON = 1e-6


def flow_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Flow-Attention (Wu et al., "Flowformer", ICML 2022, section 3.2, equations 5 to 8).

    With q, k their sigmoids, e = 1e-6, and sums over all tokens:

        in_i = 1 / ((q_i + e) . (sum_j k_j + e) + e)
        out_j = 1 / ((k_j + e) . (sum_i q_i + e) + e)
        sink_i = (q_i + e) . (sum_j k_j out_j + e) + e
        source_j = clamp((k_j + e) . (sum_i q_i in_i + e) + e, -1, 1)
        result_i = in_i sigmoid(sink_i) q_i . sum_j k_j softmax_j(source) S v_j

    This is the vision copy of the official code, which adds e after each sum too.

    Args:
        q: Queries [B, S, H, D], before the sigmoid.
        k: Keys [B, S, Hkv, D], before the sigmoid; shared heads are repeated.
        v: Values [B, S, Hkv, D].
        key_mask: bool [B, S], True for tokens that exist: others add to no sum, be it of keys or queries, and S
            is their number, as if they were not there. Their own queries still get a result.

    Returns:
        [B, S, H, D] in v's dtype; zeros for a sample without any token. Computed in float32 at least.
    """
    flows = _flows(q, k, key_mask)
    values = repeated(widened(v), q.shape[2]) * flows.keys[..., None]
    state = torch.einsum("bshf,bshd->bhfd", flows.k, values)
    out = torch.einsum("bshf,bhfd->bshd", flows.q, state) * flows.queries[..., None]
    return out.to(v.dtype)


def flow_weights(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights that `flow_attention` gives the values for some queries [R]: [B, H, R, S]."""
    flows = _flows(q, k, key_mask)
    read = (flows.q * flows.queries[..., None])[:, rows]
    return torch.einsum("brhf,bshf->bhrs", read, flows.k * flows.keys[..., None])


class _Flows(NamedTuple):
    """What multiplies what: sigmoid features [B, S, H, D], and a factor per query and per key [B, S, H]."""

    q: torch.Tensor
    k: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor


def _flows(q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None) -> _Flows:
    heads = q.shape[2]
    q, k = widened(q).sigmoid(), repeated(widened(k).sigmoid(), heads)
    shared, shown = q, None
    count: torch.Tensor | int = k.shape[1]
    if key_mask is not None:
        shown = key_mask[:, :, None].expand(-1, -1, heads)
        shared, k = q * shown[..., None], k * shown[..., None]
        count = key_mask.sum(1).to(q.dtype)[:, None, None]
    incoming = 1 / (_dot(q, k.sum(1, keepdim=True)) + EPSILON)
    outgoing = 1 / (_dot(k, shared.sum(1, keepdim=True)) + EPSILON)
    sink = _dot(q, (k * outgoing[..., None]).sum(1, keepdim=True)) + EPSILON
    source = (_dot(k, (shared * incoming[..., None]).sum(1, keepdim=True)) + EPSILON).clamp(-1, 1)
    if shown is not None:
        # A finite floor: a sample without any token still has a softmax, whose keys are zero.
        source = source.masked_fill(~shown, -1e30)
    return _Flows(q, k, incoming * sink.sigmoid(), source.softmax(1) * count)


def _dot(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(x + e) . (total + e) per token and head: [B, S, H]."""
    return ((x + EPSILON) * (total + EPSILON)).sum(-1)
