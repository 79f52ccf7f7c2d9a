"""Attention rollout of chosen tokens through all layers, by one backward call a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visattn.given import as_numbers, said
from visattn.maps.measures import received
from visattn.operands import wide_dtype
from visattn.recorded import Recorded, check_recorded


@torch.no_grad()
def rollout(calls: Sequence[Recorded], rows: torch.Tensor | Sequence[int] | None = None) -> torch.Tensor:
    """From which tokens of the input the tokens of the last layer are made, by attention and residuals alone.

    From the last layer to the first r <- r/2 + A^T r/2, heads averaged, which equals the rows of the product of all
    (I + A)/2 (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 4) without ever forming A.

    Args:
        calls: One call of each layer, in the order of the layers.
        rows: Tokens [R]; or weights [R, S] of all tokens in each row; None for the class token where something stands
            before the grid, else the mean of all tokens of the grid.

    Returns:
        [B, R, S]; each row sums to 1.

    Raises:
        ValueError: If layers attend over different sequences, or a row is no token.
    """
    check_recorded(calls, many=True)
    if not calls:
        raise ValueError("rollout goes through the calls of all layers: give at least one")
    layouts = dict.fromkeys(call.layout for call in calls)
    if len(layouts) > 1:
        raise ValueError(
            f"rollout needs one sequence in all layers, and there are {', '.join(map(str, layouts))}: choose "
            "layers of one"
        )
    first = calls[0]
    r = _start(first, rows)
    for call in reversed(calls):
        r = r / 2 + received(call, r) / (2 * call.q.shape[2])
    return r


def _start(call: Recorded, rows: torch.Tensor | Sequence[int] | None) -> torch.Tensor:
    """The rows behind the last layer: [B, R, S]."""
    layout = call.layout
    dtype = wide_dtype(call.q)
    if rows is None:
        start = torch.zeros(1, layout.length, dtype=dtype, device=call.q.device)
        if layout.prefix:
            start[:, 0] = 1
        else:
            start[:, layout.prefix : layout.prefix + layout.tokens] = 1 / layout.tokens
    else:
        given = _as_tensor(rows, layout.length).to(call.q.device)
        if not given.numel():
            raise ValueError(f"rows={said(rows)} names no row: give at least one, or None")
        if given.ndim == 2 and given.shape[1] == layout.length and not given.is_complex():
            start = given.to(dtype)
        elif given.ndim == 1 and _counts(given) and bool(((given >= 0) & (given < layout.length)).all()):
            start = torch.nn.functional.one_hot(given.long(), layout.length).to(dtype)
        else:
            raise ValueError(
                f"rows={said(rows)} must be whole numbers [R] from 0 to {layout.length - 1}, or weights [R, S] "
                f"with S {layout.length}"
            )
    return start[None].expand(call.q.shape[0], -1, -1)


def _as_tensor(rows: Any, length: int) -> torch.Tensor:
    try:
        return as_numbers(rows)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"rows={said(rows)} must be whole numbers [R] from 0 to {length - 1}, or weights [R, S] with S {length}"
        ) from None


def _counts(given: torch.Tensor) -> bool:
    """Whether a tensor is of whole numbers; an empty list is."""
    return not given.numel() or not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
