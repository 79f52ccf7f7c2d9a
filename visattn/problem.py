"""A checked attention call, and what about it decides who can run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.operands import wants_gradient
from visattn.patterns import Pattern, SpannedPattern


class Support(NamedTuple):
    """Whether a backend can run a call, and if not, why.

    Attributes:
        ok: Whether it can.
        reason: Why not.
    """

    ok: bool
    reason: str = ""

    @property
    def other(self) -> bool:
        """Whether the backend is made for patterns of another kind."""
        return isinstance(self, OtherKind)


class OtherKind(Support):
    """The refusal of a backend that is made for patterns of another kind: nothing would make it run this one."""

    __slots__ = ()


# Queries and keys become int8 in both; weights and values become int8, or floats of 8 bits (e4m3).
PRECISIONS = ("int8", "fp8")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a checked call besides q, k and v.

    Attributes:
        pattern: The pattern.
        layout: The tokens; it says where the keys are if those are others than the queries.
        scale: Factor on the logits.
        key_mask: bool [B, N], True where a key may be attended, or None.
        rpb: Relative position bias [H, 2 * window - 1 per axis], or None.
        lse: Whether the log-sum-exp is wanted.
        parameters: Learnable parameters of the pattern by name; missing ones have their initial values.
        precision: What products are computed in: one of `PRECISIONS`, or None for the dtype of q.
    """

    pattern: Pattern
    layout: Layout
    scale: float
    key_mask: torch.Tensor | None = None
    rpb: torch.Tensor | None = None
    lse: bool = False
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    precision: str | None = None


def is_strict() -> bool:
    """Whether torch.use_deterministic_algorithms is on and more than a warning."""
    library: Any = torch._C
    return library._get_deterministic_algorithms() and not library._get_deterministic_algorithms_warn_only()


def sees_all(pattern: Pattern, layout: Layout) -> bool:
    """Whether a pattern shows every token all tokens and nothing else, so that it is dense attention."""
    return pattern.covers(*layout.grids)


def is_triangular(pattern: Pattern, layout: Layout) -> bool:
    """Whether a grid token sees itself, the grid tokens before it and all dense tokens, and nothing else.

    With tokens of the prefix and suffix first, the rows of grid tokens are those of a lower triangular matrix then.
    """
    if layout.key_layout is not None or not isinstance(pattern, SpannedPattern):
        return False
    has_dense = layout.length > layout.tokens
    return (pattern.dense_pairs or not has_dense) and _triangular(pattern, layout.grid)


# Asked at every call, and made of an array as long as the line.
@kept
def _triangular(pattern: SpannedPattern, grid: tuple[int, ...]) -> bool:
    return pattern.triangular(grid)


@dataclass(frozen=True)
class Problem:
    """Everything about a call that decides who can run it, without its tensors.

    Attributes:
        pattern: The pattern.
        layout: The tokens.
        batch: Batch size.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels per head.
        dtype: Of q, k and v.
        device: Device type: "cpu", "cuda".
        key_mask: Whether some keys are masked out per sample.
        rpb: Whether a relative position bias is added.
        grad: Whether gradients will be asked for.
        lse: Whether the log-sum-exp is asked for.
        mode: How calls are made: "eager", "compiled" (as operators of compiled code) or "captured" (in a CUDA graph,
            where they keep the host from nothing).
        precision: What products are computed in: one of `PRECISIONS`, or None for the dtype of q.
        strict: Whether torch is told to refuse what is not deterministic.
        listed: Share of the key tiles that query tiles visit, where q and k have made their lists already; None where
            what is expected has to do.
    """

    pattern: Pattern
    layout: Layout
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    key_mask: bool = False
    rpb: bool = False
    grad: bool = False
    lse: bool = False
    mode: str = "eager"
    precision: str | None = None
    strict: bool = False
    listed: float | None = None

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Problem:
        """The problem that a checked call poses."""
        tensors = [t for t in (q, k, v, call.rpb, *call.parameters.values()) if t is not None]
        return cls(
            pattern=call.pattern,
            layout=call.layout,
            batch=q.shape[0],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            dtype=q.dtype,
            device=q.device.type,
            key_mask=call.key_mask is not None,
            rpb=call.rpb is not None,
            grad=wants_gradient(*tensors),
            lse=call.lse,
            precision=call.precision,
            strict=is_strict(),
        )

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key but for the key mask."""
        return sees_all(self.pattern, self.layout)

    @property
    def is_triangular(self) -> bool:
        """Whether the pattern is a line that is causal as a whole, beside its dense tokens and but for the key mask."""
        return is_triangular(self.pattern, self.layout)

    @property
    def dense_pairs(self) -> float:
        """Pairs of tokens that dense attention computes, all samples (of an empty batch one) and heads together."""
        return float(max(1, self.batch) * self.heads) * self.layout.pairs
