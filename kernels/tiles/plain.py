"""Attention by plain operators that can be differentiated any number of times, a few problems at a time.

Kernels know first derivatives. Where more are asked for, `gradients` computes them in a loop over all problems, in
which autograd differentiates each piece on its own. Whatever the order of the derivative, what exists at a time are the
scores of one piece, and tensors of the sizes of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from visattn.kernels.tiles.batches import Work, batches
from visattn.kernels.tiles.heads import ALL_HEADS
from visattn.kernels.tiles.moves import Shapes
from visattn.kernels.tiles.sides import OfAll, PerKey, PerQuery, Piece, pieces, places
from visattn.operands import wide_dtype

Tensors = Sequence[torch.Tensor]
# What a tensor may be: [B, S, H, D], [B, S, H], [B, N, Hkv, D] or [H, ...].
SIDES = {"query": PerQuery, "statistic": PerQuery, "key": PerKey, "bias": OfAll}


class Step(NamedTuple):
    """A function of one piece, and what its tensors are.

    Attributes:
        compute: Takes a piece, the factor on its scores and its tensors; gives its results.
        takes: What each tensor is, queries and keys first.
        gives: What each result is.
    """

    compute: Callable[[Piece, float, Tensors], Tensors]
    takes: tuple[str, ...]
    gives: tuple[str, ...]

    def derivative(self) -> Step:
        """Takes the gradients of the results behind the arguments, gives the gradients of the arguments."""
        number = len(self.takes)

        def compute(piece: Piece, scale: float, tensors: Tensors) -> Tensors:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors[:number]]
                pairs = zip(self.compute(piece, scale, inputs), tensors[number:], strict=True)
                results, grads = zip(*((result, g) for result, g in pairs if result.requires_grad), strict=True)
                return torch.autograd.grad(
                    results, inputs, grads, create_graph=again, allow_unused=True, materialize_grads=True
                )

        return Step(compute, self.takes + self.gives, self.takes)


def attend(piece: Piece, scale: float, tensors: Tensors) -> Tensors:
    """Output [n, Hkv, rows, D] and log-sum-exp [n, Hkv, rows, 1] of q, k [n, Hkv, L, D], v, perhaps a bias [H, ...]."""
    q, k, v = tensors[:3]
    part = piece.part
    scores = q @ k.transpose(-1, -2) * scale
    if len(tensors) > 3 and part.group.rpb_index is not None:
        scores = scores + piece.of_rows(piece.shapes.position_bias(tensors[3], part.group))
    if part.bias is not None:
        scores = scores + piece.of_rows(part.bias)
    if part.hidden is None:
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)
    # Finite scores keep the gradients of rows without any key finite; what such a row gives is a constant.
    hidden = piece.of_rows(part.hidden[..., None])
    scores = scores.masked_fill(hidden, 0.0)
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ v, lse


class _Mapped(torch.autograd.Function):
    """A step over all problems of a call; its derivative is the derived step over them."""

    @staticmethod
    def forward(ctx: Any, step: Step, work: Work, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Results of the step, in the dtypes of the tensors that they are like."""
        ctx.save_for_backward(*tensors)
        ctx.step, ctx.work = step, work
        with torch.autocast(tensors[0].device.type, enabled=False):
            return mapped(step, work, [t.detach() for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The same of the derivative."""
        return None, None, *_Mapped.apply(ctx.step.derivative(), ctx.work, *ctx.saved_tensors, *grads)


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor | None,
    work: Work,
    grad: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, v and rpb (None without one), which can be differentiated again.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        v: Values [B, N, Hkv, D].
        rpb: Relative position bias [H, ...], or None.
        work: The rest of the call.
        grad: Gradient of the output [B, S, H, D], None for zeros.
        grad_lse: Gradient of the log-sum-exp [B, S, H], None for zeros.
    """
    heads = work.heads
    if heads.groups > 1:
        # Here groups of heads are samples.
        q, k, v = heads.queries(q), heads.keys(k), heads.keys(v)
        grad, grad_lse = (t if t is None else heads.queries(t) for t in (grad, grad_lse))
        work = replace(work, key_mask=heads.samples(work.key_mask), heads=ALL_HEADS)
        dq, dk, dv, drpb = gradients(q, k, v, rpb, work, grad, grad_lse)
        assert dq is not None and dk is not None and dv is not None
        return heads.joined(dq), heads.key_gradient(dk), heads.key_gradient(dv), drpb
    grad = torch.zeros_like(q) if grad is None else grad
    if grad_lse is None:
        grad_lse = q.new_zeros(q.shape[:3], dtype=wide_dtype(q))
    bias = () if rpb is None else (rpb,)
    step = Step(attend, ("query", "key", "key", *("bias" for _ in bias)), ("query", "statistic")).derivative()
    found = _Mapped.apply(step, work, q, k, v, *bias, grad, grad_lse)
    return found if bias else (*found, None)


def mapped(step: Step, work: Work, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    """The results of a derivative for all problems of a call; `tensors` are as `step.takes` says."""
    q, k = tensors[:2]
    shapes = Shapes(q, k)
    like = dict(zip(step.takes, tensors, strict=True))
    sides = {kind: SIDES[kind](shapes, t) for kind, t in like.items()}
    takes, gives = ([sides[kind] for kind in kinds] for kinds in (step.takes, step.gives))
    rows = [side.rows(t) for side, t in zip(takes, tensors, strict=True)]
    totals = [side.total() for side in gives]
    for batch in batches(work, q, k, None):
        for place in places(batch, k):
            own = [side.problems(t, place) for side, t in zip(takes, rows, strict=True)]
            # What a derivative gives is like something that it takes.
            made = [torch.zeros_like(own[step.takes.index(kind)]) for kind in step.gives]
            for piece in pieces(place.part, shapes):
                found = step.compute(piece, work.scale, [s.cut(t, piece) for s, t in zip(takes, own, strict=True)])
                for side, whole, part in zip(gives, made, found, strict=True):
                    side.cut(whole, piece).add_(part)
            for side, total, whole in zip(gives, totals, made, strict=True):
                side.add(total, whole, place)
    return tuple(side.whole(total) for side, total in zip(gives, totals, strict=True))
