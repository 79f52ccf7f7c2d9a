"""The tensors of a call in the form that a pattern runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from visattn.attend import attention
from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.patterns.choice.memory import beside
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import carry_bias
from visattn.straight import attention_through


class Sequences(NamedTuple):
    """Queries, keys and values in the form that a pattern runs on.

    Where a call has keys beyond its queries, and its layout does not say so by a `key_layout`, rows of zeros stand for
    the queries of those. Where it has queries before those of its layout, these are the model's own.

    Attributes:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        keys: Valid keys, bool [B, S], or None for all.
        scale: Factor on the logits.
        channels: Channels of the output that count.
        rows: The queries of the call among those here, None for all.
        before: The call of the queries before those here, which keep the model's own attention; None for none.
        rpb: Relative position bias of a neighborhood, None for none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor | None
    scale: float
    channels: int
    rows: slice | None = None
    before: AttentionCall | None = None
    rpb: torch.Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall, keys: torch.Tensor | None, layout: Layout) -> Sequences:
        """From a call, what `key_validity` found and where the tokens sit.

        Args:
            call: The call.
            keys: Valid keys, or a bias, which q and k then carry.
            layout: Where the tokens sit; without a `key_layout` that of the keys, see `query_rows` for the queries.
        """
        q, k, v = call.tensors
        channels = v.shape[3]
        if layout.key_layout is not None:
            first = q.shape[1] - layout.length
            before = _rows(call, first) if first else None
            return cls(q[:, first:], k, v, keys, call.factor, channels, before=before)
        if q.shape[1] < k.shape[1]:
            rows = query_rows(q.shape[1], layout)
            assert not isinstance(rows, str), rows
            q = torch.nn.functional.pad(q, (0, 0, 0, 0, rows.start, k.shape[1] - rows.stop))
            return cls(q, k, v, keys, call.factor, channels, rows)
        if keys is not None and keys.dtype != torch.bool:
            q, k, v = carry_bias(q, k, v, keys, call.factor)
            keys = None
        return cls(q, k, v, keys, call.factor, channels, rpb=call.rpb)

    def attend(
        self,
        pattern: Pattern,
        layouts: tuple[Layout, ...],
        backend: str,
        parameters: Mapping[str, torch.Tensor],
        precision: str | None = None,
    ) -> torch.Tensor:
        """Run a pattern: [B, S, H, channels] of the call's queries; with several layouts sample by sample."""
        if self.before is not None:
            rest = self._replace(before=None).attend(pattern, layouts, backend, parameters, precision)
            return torch.cat([_dense(self.before), rest], 1)
        if self.rows is not None:
            return self._replace(rows=None).attend(pattern, layouts, backend, parameters, precision)[:, self.rows]
        if len(layouts) == 1:
            options: dict[str, Any] = {"scale": self.scale, "key_mask": self.keys, "backend": backend}
            if parameters:
                options["parameters"] = parameters
            if self.rpb is not None:
                options["rpb"] = self.rpb
            tensors = self.q, self.k, self.v
            if precision is None:
                return attention(*tensors, pattern, layouts[0], **options)[..., : self.channels]
            return attention_through(*tensors, pattern, layouts[0], **options, precision=precision)[
                ..., : self.channels
            ]
        parts = []
        for i, layout in enumerate(layouts):
            with beside(i):
                parts.append(self.sample(i).attend(pattern, (layout,), backend, parameters, precision))
        return torch.cat(parts)

    def sample(self, i: int) -> Sequences:
        """One sample, still as a batch."""
        at = slice(i, i + 1)
        keys = None if self.keys is None else self.keys[at]
        return self._replace(q=self.q[at], k=self.k[at], v=self.v[at], keys=keys)


def _rows(call: AttentionCall, first: int) -> AttentionCall:
    """The call of the first queries."""
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., :first, :]
    return replace(call, q=call.q[:, :first], mask=mask)


def _dense(call: AttentionCall) -> torch.Tensor:
    """What torch's own attention makes of a call: [B, S, H, D]."""
    q, k, v = call.swapped().tensors
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, call.mask, scale=call.scale, enable_gqa=call.grouped
    )
    return found.transpose(1, 2)


def with_keys(rows: slice, layout: Layout) -> Layout:
    """The layout of some queries, from in or before the grid to its end or beyond, with all keys.

    Args:
        rows: Which tokens ask, of `layout`.
        layout: Of the keys.
    """
    end = layout.prefix + layout.tokens
    return Layout(layout.grid, layout.prefix - rows.start, rows.stop - end, layout)


def with_queries(queries: int, layouts: tuple[Layout, ...]) -> tuple[Layout, ...] | str:
    """The layout of the queries of a call with more keys, with all of these, or why there is none.

    Args:
        queries: Number of queries, fewer than keys.
        layouts: Of the keys, of each sample where they differ.
    """
    if len(layouts) > 1:
        return "its samples, whose tokens sit in different places, have keys beyond their queries"
    layout = next(iter(layouts))
    rows = query_rows(queries, layout)
    return rows if isinstance(rows, str) else (with_keys(rows, layout),)


def query_rows(queries: int, layout: Layout) -> slice | str:
    """Which tokens ask, where a call has fewer queries than keys: those of the grid, or else the last; or why none do.

    Args:
        queries: Number of queries, fewer than keys.
        layout: Of the keys.
    """
    if queries == layout.tokens:
        return slice(layout.prefix, layout.prefix + layout.tokens)
    if layout.length - queries > layout.prefix:
        return f"its {queries} queries are neither the grid of {layout} nor end with it"
    return slice(layout.length - queries, layout.length)
