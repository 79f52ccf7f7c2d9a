"""Run batches of small attention problems, forward and backward, with autograd."""

from __future__ import annotations

from typing import Any

import torch

from visattn.kernels.tiles import fused as kernels
from visattn.kernels.tiles import routed
from visattn.kernels.tiles.batches import Batch, Work, batches
from visattn.kernels.tiles.groups import Group
from visattn.kernels.tiles.moves import Buffers, Shapes, accumulate
from visattn.kernels.tiles.plain import gradients
from visattn.kernels.unchanged import savable


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] -> [B * S, H * D], without a copy where the heads of a token are neighbours."""
    return x.flatten(2).flatten(0, 1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, S, H, D] of all problems and, if the work wants it, log-sum-exp [B, S, H] (float32 at least)."""
    shapes, buffers = Shapes(q, k), Buffers()
    q_rows, k_rows, v_rows = _rows(q), _rows(k), _rows(v)
    # The last row takes what empty slots of short tiles compute.
    rows, channels = q_rows.shape
    out = q.new_empty(rows + 1, channels)
    lse = q.new_empty(rows + 1, q.shape[2], dtype=shapes.wide) if work.lse else None
    for group in work.problems.routed:
        routed.forward(group, work, q, k, v, out, lse)
    for batch in batches(work.listed(), q, k, rpb):
        queries = buffers.gather("q", q_rows, batch.queries).split_with_sizes(batch.query_rows)
        keys = _keys(batch, k, k_rows, shapes, buffers, "k")
        values = _keys(batch, v, v_rows, shapes, buffers, "v")
        for i, part in enumerate(batch.parts):
            problems = shapes.queries(queries[i], part.slots)
            own, own_lse = kernels.forward(problems, keys[i], values[i], part.bias, work.scale)
            if part.hidden is not None:
                own = own.masked_fill(part.hidden[..., None], 0)
                own_lse = own_lse.masked_fill(part.hidden, float("-inf"))
            out.index_copy_(0, batch.targets[i], shapes.query_rows(own, part.slots))
            if lse is not None:
                lse.index_copy_(0, batch.targets[i], shapes.query_rows(own_lse[..., None], part.slots).to(lse.dtype))
    return out[:-1].view(q.shape), None if lse is None else lse[:-1].view(q.shape[:3])


def _queries(batch: Batch, per_query: dict[str, torch.Tensor], buffers: Buffers) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the backward needs of the queries of each part of a batch."""
    gathered = {name: buffers.gather(name, rows, batch.queries) for name, rows in per_query.items()}
    if any(part.group.short_queries for part in batch.parts):
        # An empty slot repeats some token: without a gradient of its own it adds nothing to the keys'.
        empty = (batch.target == len(per_query["q"]))[:, None]
        for name in {"grad", "grad_lse"} & set(gathered):
            gathered[name].masked_fill_(empty, 0)
    return {name: rows.split_with_sizes(batch.query_rows) for name, rows in gathered.items()}


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _keys(
    batch: Batch, whole: torch.Tensor, rows: torch.Tensor, shapes: Shapes, buffers: Buffers, name: str
) -> list[torch.Tensor]:
    """Keys or values of each part of a batch: [n, Hkv, L, D]."""
    if batch.keys is None:
        return [whole[batch.samples, : batch.parts[0].length].transpose(1, 2)]
    parts = buffers.gather(name, rows, batch.keys).split_with_sizes(batch.key_rows)
    return [shapes.keys(own, part.length) for own, part in zip(parts, batch.parts, strict=True)]


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    work: Work,
    want_rpb: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k, v and, if wanted, rpb; shapes as in `forward`."""
    shapes, buffers = Shapes(q, k), Buffers()
    per_query = {"q": _rows(q), "grad": _rows(grad), "out": _rows(out), "lse": kernels.finite(lse).flatten(0, 1)}
    if grad_lse is not None:
        per_query["grad_lse"] = grad_lse.to(shapes.wide).flatten(0, 1)
    k_rows, v_rows = _rows(k), _rows(v)
    dq = q.new_empty(len(per_query["q"]) + 1, per_query["q"].shape[1])
    dk, dv = (torch.zeros(*k.shape[:2], k_rows.shape[1], dtype=shapes.wide, device=k.device) for _ in range(2))
    drpb = rpb.new_zeros(rpb.shape[0], rpb[0].numel() + 1, dtype=shapes.wide) if want_rpb and rpb is not None else None
    for group in work.problems.routed:
        totals = routed.Totals(dq, dk.flatten(0, 1), dv.flatten(0, 1))
        routed.backward(group, work, q, k, v, per_query, totals)
    for batch in batches(work.listed(), q, k, rpb):
        split = _queries(batch, per_query, buffers)
        keys = _keys(batch, k, k_rows, shapes, buffers, "k")
        values = _keys(batch, v, v_rows, shapes, buffers, "v")
        found = []
        for i, part in enumerate(batch.parts):
            mine = {name: shapes.queries(rows[i], part.slots) for name, rows in split.items()}
            own = kernels.backward(
                mine["grad"],
                mine["grad_lse"][..., 0] if grad_lse is not None else None,
                mine["q"],
                keys[i],
                values[i],
                mine["out"],
                mine["lse"][..., 0],
                part.bias,
                work.scale,
                drpb is not None and part.group.rpb_index is not None,
            )
            found.append(own)
            if drpb is not None and own.scores is not None:
                _add_rpb(drpb, own.scores, part.group)
        slots = [part.slots for part in batch.parts]
        dq.index_copy_(0, batch.target, _joined([shapes.query_rows(f.q, n) for f, n in zip(found, slots, strict=True)]))
        _add(dk, batch, [own.k for own in found])
        _add(dv, batch, [own.v for own in found])
    if drpb is not None and rpb is not None:
        drpb = drpb[:, :-1].reshape(rpb.shape).to(rpb.dtype)
    return dq[:-1].view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), drpb


def _add(total: torch.Tensor, batch: Batch, own: list[torch.Tensor]) -> None:
    """Add gradients of the keys of a batch's parts [n, Hkv, L, D] to those of all [B, N, Hkv * D]."""
    rows = [part.transpose(1, 2).flatten(2).to(total.dtype) for part in own]
    if batch.keys is None:
        total[batch.samples, : rows[0].shape[1]] += rows[0]
        return
    accumulate(total.flatten(0, 1), batch.keys, _joined([part.reshape(-1, total.shape[2]) for part in rows]))


def _add_rpb(drpb: torch.Tensor, scores: torch.Tensor, group: Group) -> None:
    """Add gradients of the scores [n, Hkv, (H / Hkv) T, L] to that of the bias [H, entries + 1]."""
    assert group.rpb_index is not None
    per_pair = scores.sum(0).reshape(drpb.shape[0], -1).T.contiguous()
    total = torch.zeros_like(drpb.T, memory_format=torch.contiguous_format)
    accumulate(total, group.rpb_index.flatten(), per_pair)
    drpb += total.T


class TileAttention(torch.autograd.Function):
    """Attention of all groups, recomputing the weights in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        out, lse = forward(q, k, v, rpb, work)
        assert lse is not None, "the backward needs the log-sum-exp"
        # The key mask is in the work, and here so that torch sees whether it changes.
        ctx.save_for_backward(q, k, v, rpb, out, lse, savable(work.key_mask))
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and rpb."""
        q, k, v, rpb, out, lse, _ = ctx.saved_tensors
        grad, grad_lse = grads
        if torch.is_grad_enabled():
            return *gradients(q, k, v, rpb, ctx.work, grad, grad_lse), None
        grad = torch.zeros_like(out) if grad is None else grad
        found = backward(grad, grad_lse, q, k, v, rpb, out, lse, ctx.work, ctx.needs_input_grad[3])
        return *found, None
