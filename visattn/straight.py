"""Training through 8 bits: the forward rounds, the backward is that of the exact call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from visattn.attend import attention
from visattn.layout import Layout
from visattn.operands import wants_gradient
from visattn.patterns import Pattern

_through: ContextVar[bool] = ContextVar("straight_through", default=False)


@contextmanager
def straight_through() -> Iterator[None]:
    """Context in which models that were applied with a `precision` can be trained: quantisation-aware training.

    A call that needs gradients gives what 8 bits give, and gets the gradients of the exact call (Bengio et al.,
    "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, section 4). It runs both, so that a
    training step costs a forward of attention more. The lists that queries and keys choose are those of both.
    """
    token = _through.set(True)
    try:
        yield
    finally:
        _through.reset(token)


def attention_through(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, layout: Layout, **options: Any
) -> torch.Tensor:
    """`attention` with a precision among its options: with gradients, inside of `straight_through`, of both."""
    given = (q, k, v, *(options.get("parameters") or {}).values())
    learns = wants_gradient(*given)
    if not (learns and _through.get()):
        return attention(q, k, v, pattern, layout, **options)
    with torch.no_grad():
        rounded = attention(q, k, v, pattern, layout, **options)
    exact: dict[str, Any] = options | {"precision": None}
    return _Through.apply(attention(q, k, v, pattern, layout, **exact), rounded)


class _Through(torch.autograd.Function):
    """The value of one tensor, bit by bit, and the gradient of another."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
