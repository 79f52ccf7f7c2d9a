"""Run batches of small attention problems, forward and backward, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from visattn.kernels import tiles_kernels as kernels
from visattn.kernels.tiles_batches import Batch, Buffers, Shapes, Work, batches
from visattn.kernels.tiles_groups import Group


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] -> [B * S, H * D], without a copy where the heads of a token are neighbours."""
    return x.flatten(2).flatten(0, 1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H] (float32 at least) of all groups."""
    shapes, buffers = Shapes(q, k), Buffers()
    q_rows, k_rows, v_rows = (_rows(t) for t in (q, k, v))
    # The last row takes what empty slots of short tiles compute.
    out = q.new_empty(len(q_rows) + 1, q_rows.shape[1])
    lse = q.new_empty(len(q_rows) + 1, q.shape[2], dtype=shapes.wide)
    for batch in batches(work, q, k, rpb, shapes):
        slots = batch.group.queries.shape[1]
        queries = shapes.queries(buffers.gather("q", q_rows, batch.queries), slots)
        keys = _keys(batch, k, k_rows, shapes, buffers, "k")
        values = _keys(batch, v, v_rows, shapes, buffers, "v")
        some_out, some_lse = kernels.forward(queries, keys, values, batch.bias, work.scale)
        if batch.hidden is not None:
            some_out = some_out.masked_fill(batch.hidden[..., None], 0)
            some_lse = some_lse.masked_fill(batch.hidden, float("-inf"))
        out.index_copy_(0, batch.target, shapes.query_rows(some_out, slots))
        lse.index_copy_(0, batch.target, shapes.query_rows(some_lse[..., None], slots).to(lse.dtype))
    return out[:-1].view(q.shape), lse[:-1].view(q.shape[:3])


def _keys(
    batch: Batch, whole: torch.Tensor, rows: torch.Tensor, shapes: Shapes, buffers: Buffers, name: str
) -> torch.Tensor:
    """Keys or values of a batch: [n, Hkv, L, D]."""
    if batch.keys is None:
        return whole[batch.samples, : batch.group.length].transpose(1, 2)
    return shapes.keys(buffers.gather(name, rows, batch.keys), batch.group.length)


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
    for batch in batches(work, q, k, rpb, shapes):
        slots = batch.group.queries.shape[1]
        part = {name: buffers.gather(name, rows, batch.queries) for name, rows in per_query.items()}
        if batch.group.short_queries:
            # An empty slot repeats some token: without a gradient of its own it adds nothing to the keys'.
            empty = (batch.target == len(per_query["q"]))[:, None]
            for name in {"grad", "grad_lse"} & set(part):
                part[name].masked_fill_(empty, 0)
        part = {name: shapes.queries(rows, slots) for name, rows in part.items()}
        found = kernels.backward(
            part["grad"],
            part["grad_lse"][..., 0] if grad_lse is not None else None,
            part["q"],
            _keys(batch, k, k_rows, shapes, buffers, "k"),
            _keys(batch, v, v_rows, shapes, buffers, "v"),
            part["out"],
            part["lse"][..., 0],
            batch.bias,
            work.scale,
            drpb is not None and batch.group.rpb_index is not None,
        )
        dq.index_copy_(0, batch.target, shapes.query_rows(found.q, slots))
        _add(dk, batch, found.k)
        _add(dv, batch, found.v)
        if drpb is not None and found.scores is not None:
            _add_rpb(drpb, found.scores, batch.group)
    if drpb is not None and rpb is not None:
        drpb = drpb[:, :-1].reshape(rpb.shape).to(rpb.dtype)
    return dq[:-1].view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), drpb


def _add(total: torch.Tensor, batch: Batch, own: torch.Tensor) -> None:
    """Add gradients of a batch's keys [n, Hkv, L, D] to those of all [B, N, Hkv * D], deterministic everywhere."""
    rows = own.transpose(1, 2).flatten(2).to(total.dtype)
    if batch.keys is None:
        total[batch.samples, : rows.shape[1]] += rows
    elif total.device.type == "cpu":
        total.flatten(0, 1).index_add_(0, batch.keys, rows.flatten(0, 1))
    else:
        total.flatten(0, 1).index_put_((batch.keys,), rows.flatten(0, 1), accumulate=True)


def _add_rpb(drpb: torch.Tensor, scores: torch.Tensor, group: Group) -> None:
    """Add gradients of the scores [n, Hkv, (H / Hkv) T, L] to that of the bias [H, entries + 1]."""
    assert group.rpb_index is not None
    per_pair = scores.sum(0).reshape(drpb.shape[0], -1).T.contiguous()
    total = torch.zeros_like(drpb.T, memory_format=torch.contiguous_format)
    index = group.rpb_index.flatten()
    if drpb.device.type == "cpu":
        total.index_add_(0, index, per_pair)
    else:
        total.index_put_((index,), per_pair, accumulate=True)
    drpb += total.T


class TileAttention(torch.autograd.Function):
    """Attention of all groups, recomputing the weights in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp."""
        out, lse = forward(q, k, v, rpb, work)
        ctx.save_for_backward(q, k, v, rpb, out, lse)
        ctx.work = work
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and rpb."""
        q, k, v, rpb, out, lse = ctx.saved_tensors
        grad, grad_lse = grads
        grad = torch.zeros_like(out) if grad is None else grad
        found = backward(grad, grad_lse, q, k, v, rpb, out, lse, ctx.work, ctx.needs_input_grad[3])
        return *found, None
