"""Run groups of small attention problems, a cache-sized batch at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visattn.kernels import tiles_kernels as kernels
from visattn.kernels.tiles_groups import Group

# Gathered keys and values of one batch of problems, in bytes: they should stay in the cache.
BATCH_BYTES = 6 * 2**20


@dataclass(frozen=True, eq=False)
class Work:
    """Everything about a call besides its floating-point tensors.

    Attributes:
        groups: The problems.
        scale: Factor on the scores.
        key_mask: bool [B, keys], or None.
    """

    groups: Sequence[Group]
    scale: float
    key_mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Problems of one group that run together.

    Attributes:
        group: Their group.
        samples: First sample and one past the last; meaningful where `keys` is None.
        queries: Rows of q [B * S] of every slot: [problems * T].
        padded: Which of these slots are empty: bool [problems * T], or None.
        keys: Rows of k and v [B * keys]: [problems * L], or None for the leading ones.
        visible: bool [1 or problems, 1 or T, L], or None where all is.
    """

    group: Group
    samples: slice
    queries: torch.Tensor
    padded: torch.Tensor | None
    keys: torch.Tensor | None
    visible: torch.Tensor | None


def batches(work: Work, q: torch.Tensor, k: torch.Tensor) -> Iterator[Batch]:
    """Cut all groups in batches of problems.

    Args:
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
    """
    samples, tokens = q.shape[0], k.shape[1]
    for group in work.groups:
        tiles, length = len(group.queries), group.length
        size = max(1, BATCH_BYTES // (2 * length * k.shape[2] * k.shape[3] * k.element_size()))
        for start in range(0, samples * tiles, size):
            problem = torch.arange(start, min(start + size, samples * tiles), device=q.device)
            sample, tile = problem // tiles, problem % tiles
            queries = group.queries[tile]
            padded = queries < 0 if group.short_queries else None
            queries = queries.clamp(min=0) if group.short_queries else queries
            keys = group.keys(sample, tile)
            visible = group.visible(tile)
            if keys is not None:
                if group.short_keys:
                    visible = _and(visible, (keys >= 0)[:, None])
                keys = (keys.clamp(min=0) + sample[:, None] * tokens).flatten()
            if work.key_mask is not None:
                shown = (
                    work.key_mask[sample, :length] if keys is None else work.key_mask.flatten()[keys].view(-1, length)
                )
                visible = _and(visible, shown[:, None])
            yield Batch(
                group,
                slice(start, start + len(problem)),
                (queries + sample[:, None] * q.shape[1]).flatten(),
                None if padded is None else padded.flatten(),
                keys,
                visible,
            )


def _and(a: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    return b if a is None else a & b


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] -> [B * S, H * D], without a copy where the heads of a token are neighbours."""
    return x.flatten(2).flatten(0, 1)


class _Shapes:
    """Moves tokens between rows [tokens, H * D] and problems [n, Hkv, (H / Hkv) T, D]."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.heads, self.kv_heads, self.dim = q.shape[2], k.shape[2], q.shape[3]
        self.each = self.heads // self.kv_heads

    def queries(self, rows: torch.Tensor, slots: int) -> torch.Tensor:
        """Rows [n * T, H * D] or [n * T, H] as problems."""
        x = rows.view(-1, slots, self.kv_heads, self.each, rows.shape[1] // self.heads)
        if self.each == 1:
            return x[:, :, :, 0].transpose(1, 2)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def query_rows(self, x: torch.Tensor, slots: int) -> torch.Tensor:
        """Inverse of `queries`."""
        return x.unflatten(2, (self.each, slots)).permute(0, 3, 1, 2, 4).reshape(-1, self.heads * x.shape[-1])

    def keys(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """Rows [n * L, Hkv * D] as problems."""
        return rows.view(-1, length, self.kv_heads, self.dim).transpose(1, 2)

    def bias(
        self, visible: torch.Tensor | None, rpb: torch.Tensor | None, group: Group, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Additive bias of a batch: [1 or n, 1 or Hkv, 1 or (H / Hkv) T, L]."""
        bias = None
        if visible is not None:
            zero = torch.zeros((), dtype=dtype, device=visible.device)
            bias = torch.where(visible, zero, float("-inf"))[:, None]
        if rpb is not None and group.rpb_index is not None:
            table = torch.nn.functional.pad(rpb.flatten(1).to(dtype), (0, 1))
            added = table[:, group.rpb_index][None]
            bias = added if bias is None else bias + added
        if bias is None or self.each == 1 or bias.shape[2] == 1:
            return bias
        slots, length = bias.shape[2:]
        if bias.shape[1] == 1:
            return bias.expand(-1, self.each, -1, -1).reshape(-1, 1, self.each * slots, length)
        return bias.reshape(-1, self.kv_heads, self.each * slots, length)


class _Buffers:
    """Memory for gathered rows, reused from batch to batch: fresh pages cost as much as the gather itself."""

    def __init__(self) -> None:
        self.store: dict[str, torch.Tensor] = {}

    def gather(self, name: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """rows[index], valid until the next gather of that name."""
        buffer = self.store.get(name)
        if buffer is None or len(buffer) < len(index):
            buffer = self.store[name] = rows.new_empty(len(index), rows.shape[1])
        return torch.index_select(rows, 0, index, out=buffer[: len(index)])


def _bias_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _hidden(bias: torch.Tensor | None, work: Work, group: Group) -> torch.Tensor | None:
    """Which rows see no key at all, where that can be: bool like the log-sum-exp."""
    if bias is None or (work.key_mask is None and group.mask is None and group.shared is None):
        return None
    hidden = (bias == float("-inf")).all(-1)
    return hidden if hidden.any() else None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rpb: torch.Tensor | None, work: Work
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H] (float32 at least) of all groups."""
    shapes, buffers = _Shapes(q, k), _Buffers()
    q_rows, k_rows, v_rows = (_rows(t) for t in (q, k, v))
    tokens = len(q_rows)
    # The last row takes what empty slots of short tiles compute.
    out = q.new_empty(tokens + 1, q_rows.shape[1])
    lse = q.new_empty(tokens + 1, q.shape[2], dtype=_bias_dtype(q))
    for batch in batches(work, q, k):
        slots, length = batch.group.queries.shape[1], batch.group.length
        queries = shapes.queries(buffers.gather("q", q_rows, batch.queries), slots)
        if batch.keys is None:
            keys, values = (t[batch.samples, :length].transpose(1, 2) for t in (k, v))
        else:
            keys = shapes.keys(buffers.gather("k", k_rows, batch.keys), length)
            values = shapes.keys(buffers.gather("v", v_rows, batch.keys), length)
        bias = shapes.bias(batch.visible, rpb, batch.group, _bias_dtype(q))
        some_out, some_lse = kernels.forward(queries, keys, values, bias, work.scale)
        hidden = _hidden(bias, work, batch.group)
        if hidden is not None:
            some_out = some_out.masked_fill(hidden[..., None], 0)
            some_lse = some_lse.masked_fill(hidden, float("-inf"))
        target = batch.queries if batch.padded is None else batch.queries.masked_fill(batch.padded, tokens)
        out.index_copy_(0, target, shapes.query_rows(some_out, slots))
        lse.index_copy_(0, target, shapes.query_rows(some_lse[..., None], slots).to(lse.dtype))
    return out[:tokens].view(q.shape), lse[:tokens].view(q.shape[:3])


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
    """Gradients of q, k, v and, if wanted, rpb."""
    shapes, buffers, wide = _Shapes(q, k), _Buffers(), _bias_dtype(q)
    inputs = {"q": q, "k": k, "v": v, "grad": grad, "out": out}
    rows = {name: _rows(t) for name, t in inputs.items()}
    lse_rows = {"lse": kernels.finite(lse).flatten(0, 1)}
    if grad_lse is not None:
        lse_rows["grad_lse"] = grad_lse.to(wide).flatten(0, 1)
    tokens = len(rows["q"])
    dq = q.new_empty(tokens + 1, rows["q"].shape[1])
    dk, dv = (torch.zeros(*k.shape[:2], rows["k"].shape[1], dtype=wide, device=k.device) for _ in range(2))
    drpb = rpb.new_zeros(rpb.shape[0], rpb[0].numel() + 1, dtype=wide) if want_rpb and rpb is not None else None
    for batch in batches(work, q, k):
        slots, length = batch.group.queries.shape[1], batch.group.length
        part = {name: buffers.gather(name, rows[name], batch.queries) for name in ("q", "grad", "out")}
        part |= {name: buffers.gather(name, t, batch.queries) for name, t in lse_rows.items()}
        if batch.padded is not None:
            for name in ("grad", "grad_lse"):
                if name in part:
                    part[name].masked_fill_(batch.padded[:, None], 0)
        part = {name: shapes.queries(t, slots) for name, t in part.items()}
        for name, whole in (("k", k), ("v", v)):
            part[name] = (
                whole[batch.samples, :length].transpose(1, 2)
                if batch.keys is None
                else shapes.keys(buffers.gather(name, rows[name], batch.keys), length)
            )
        bias = shapes.bias(batch.visible, rpb, batch.group, wide)
        found = kernels.backward(
            part["grad"],
            part["grad_lse"][..., 0] if grad_lse is not None else None,
            *(part[name] for name in ("q", "k", "v", "out")),
            part["lse"][..., 0],
            bias,
            work.scale,
            drpb is not None and batch.group.rpb_index is not None,
        )
        target = batch.queries if batch.padded is None else batch.queries.masked_fill(batch.padded, tokens)
        dq.index_copy_(0, target, shapes.query_rows(found.q, slots))
        for total, own in ((dk, found.k), (dv, found.v)):
            _add(total, batch, own.transpose(1, 2).flatten(2).to(wide))
        if drpb is not None and found.scores is not None:
            _add_rpb(drpb, found.scores, batch.group, slots)
    drpb = None if drpb is None or rpb is None else drpb[:, :-1].reshape(rpb.shape).to(rpb.dtype)
    return dq[:tokens].view(q.shape), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), drpb


def _add(total: torch.Tensor, batch: Batch, own: torch.Tensor) -> None:
    """Add the gradients of a batch's keys [n, L, Hkv * D] to all [B, N, Hkv * D]; deterministic on every device."""
    if batch.keys is None:
        total[batch.samples, : own.shape[1]] += own
    elif total.device.type == "cpu":
        total.flatten(0, 1).index_add_(0, batch.keys, own.flatten(0, 1))
    else:
        total.flatten(0, 1).index_put_((batch.keys,), own.flatten(0, 1), accumulate=True)


def _add_rpb(drpb: torch.Tensor, scores: torch.Tensor, group: Group, slots: int) -> None:
    """Add the gradient of the scores [n, Hkv, (H / Hkv) T, L] to that of the bias [H, entries + 1]."""
    assert group.rpb_index is not None
    per_pair = scores.sum(0).reshape(drpb.shape[0], slots * scores.shape[-1])
    index = group.rpb_index.flatten()
    if drpb.device.type == "cpu":
        drpb.index_add_(1, index, per_pair)
    else:
        drpb += torch.zeros_like(drpb.T).index_put_((index,), per_pair.T, accumulate=True).T


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
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and rpb."""
        q, k, v, rpb, out, lse = ctx.saved_tensors
        grad, grad_lse = grads
        grad = torch.zeros_like(out) if grad is None else grad
        found = backward(grad, grad_lse, q, k, v, rpb, out, lse, ctx.work, ctx.needs_input_grad[3])
        return *found, None
