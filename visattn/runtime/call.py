"""One attention call of a model, as its own code makes it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from visattn.autocast import as_sdpa_casts
from visattn.layout import Layout


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call of attention, built where the model's code calls and passed on from there.

    Attributes:
        q: Queries [B, S, H, D].
        k: Keys [B, Skv, Hkv, D].
        v: Values [B, Skv, Hkv, Dv].
        mask: What torch's SDPA takes, [B, H, S, Skv] or what broadcasts to it, or some mask of the client's own.
        scale: Factor on the logits, None for D ** -0.5.
        grouped: Whether several query heads share a key head.
        dropout: Probability.
        causal: Whether a query sees no later key.
        parallel: How the client splits the sequence over devices, None if it does not.
        layouts: Where its tokens sit, of each sample where they differ, or why there is no grid, if the call itself
            tells; None if its forward does.
        own: What the client's own attention needs beyond these.
        rpb: Relative position bias of a neighborhood, see `visattn.attention`.
        local: Whether the client's own attention does not see every pair, so that it never stands for a pattern.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any = None
    scale: float | None = None
    grouped: bool = False
    dropout: float = 0.0
    causal: bool = False
    parallel: Any = None
    layouts: tuple[Layout, ...] | str | None = None
    own: Any = None
    rpb: torch.Tensor | None = None
    local: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v."""
        return self.q, self.k, self.v

    @property
    def shapes(self) -> Hashable:
        """What calls that are alike have in common, whatever runs them."""
        return self.q.shape, self.k.shape, self.q.dtype

    @property
    def factor(self) -> float:
        """The factor on the logits."""
        return float(self.q.shape[3] ** -0.5 if self.scale is None else self.scale)

    def of(self, tensors: Iterable[torch.Tensor]) -> AttentionCall:
        """The same call of other q, k and v."""
        q, k, v = tensors
        return replace(self, q=q, k=k, v=v)

    def placed(self, layouts: tuple[Layout, ...] | str) -> AttentionCall:
        """The same call, which tells where its tokens sit or why there is no grid."""
        return replace(self, layouts=layouts)

    def with_own(self, own: Any) -> AttentionCall:
        """The same call with something else for the client's own attention."""
        return replace(self, own=own)

    def swapped(self) -> AttentionCall:
        """From [B, H, S, D], torch's order, to [B, S, H, D], or back."""
        return self.of(t.transpose(1, 2) for t in self.tensors)

    def autocast(self) -> AttentionCall:
        """As SDPA would see it: under autocast in its dtype."""
        return self.of(as_sdpa_casts(*self.tensors))

    def refusal(self, wider: bool = False) -> str:
        """Why no pattern can stand for this call wherever its tokens sit, empty if one can.

        Args:
            wider: Whether there may be more keys than queries.
        """
        q, k, v = self.tensors
        more = k.shape[1] - q.shape[1] if q.ndim == 4 else -1
        if more < 0 or (more and not wider) or v.shape != k.shape:
            return f"q {list(q.shape)} and k {list(k.shape)} are not self-attention of one sequence"
        if not q.dtype == k.dtype == v.dtype:
            # Keys that a model has kept from other calls; some attention takes such.
            return f"its q is {q.dtype}, k {k.dtype} and v {v.dtype}"
        if self.causal or self.dropout:
            return "it is causal" if self.causal else f"it has dropout {self.dropout}"
        if self.mask is not None and not isinstance(self.mask, torch.Tensor):
            return f"its mask is a {type(self.mask).__name__}"
        return ""
