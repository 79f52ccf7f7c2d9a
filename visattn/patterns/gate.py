"""Key blocks by a learned score of pooled queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.operands import repeated
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.pooling import bounds, means
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.routes import Routes
from visattn.patterns.text import parse
from visattn.patterns.values import MANY, whole_number

POOLS = ("max", "min", "avg")


@dataclass(frozen=True)
class Gate(ComposedPattern):
    """The lists of another dynamic pattern, whose scores come from learned maps of pooled queries and keys.

    The scores of a head are dim**-0.5 times the products of `query` and `key`, linear maps of the pools of a block.
    Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), whose pools are of
    queries and keys before their rotary embedding, which is then applied to the pools; here they are of the queries and
    keys that attention gets, so that weights must have been trained for those.

    Attributes:
        by: Who picks: topk, topp or above, with its blocks and its `always`; its score is not used.
        dim: Channels of a gate.
        query: Pools of queries: avg, max and min joined by +.
        key: Pools of keys.

    Raises:
        ValueError: If there is no such pool, or `by` is no such pattern.
    """

    by: DynamicPattern
    dim: int = 128
    query: str = "avg"
    key: str = "max+min+avg"

    name: ClassVar[str] = "gate"
    # Its maps are of the channels themselves.
    of_products: ClassVar[bool] = False
    runs_lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        pattern = parse(self.by)
        if not isinstance(pattern, DynamicPattern) or pattern.name not in ("topk", "topp", "above"):
            raise ValueError(f"by={pattern} lists no blocks by scores: give topk(...), topp(...) or above(...)")
        if (pattern.alike, pattern.every, pattern.skip, pattern.has_tail) != (None, 1, 0.0, False):
            raise ValueError(f"by={pattern}: leave alike, every, skip and rests but drop and mean out of a gate")
        if getattr(pattern, "bar", "exact") == "diag":
            raise ValueError(f"by={pattern}: bar=diag is made of means, a gate has none")
        object.__setattr__(self, "by", pattern)
        object.__setattr__(self, "dim", whole_number(self.dim, "dim", 1, high=MANY))
        for name in ("query", "key"):
            value = getattr(self, name)
            given = value.split("+") if isinstance(value, str) else []
            if not given or len(set(given)) != len(given) or not set(given) <= set(POOLS):
                raise ValueError(f"{name}={value!r} must be of max, min and avg, joined by +, each once")

    @property
    def needs_weights(self) -> bool:
        """Always: a gate that was not trained lists nothing that means anything."""
        return True

    @property
    def learnable(self) -> bool:
        """Always."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`query` and `key` [H, pools * D, dim], pools in the order in which they are named."""
        found = {name: len(getattr(self, name).split("+")) for name in ("query", "key")}
        return {name: (heads, pools * head_dim, self.dim) for name, pools in found.items()}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Where training starts: scores like products of the means, or of what stands nearest to them.

        Identities as far as they go for the averages; without those, half of one for each of max and min.
        """
        found = {}
        for name, shape in self.parameter_shapes(heads, head_dim, grid).items():
            pools = getattr(self, name).split("+")
            of = ("avg",) if "avg" in pools else pools
            parts = [
                torch.eye(head_dim, self.dim, dtype=torch.float32, device="cpu") * ((pool in of) / len(of))
                for pool in pools
            ]
            found[name] = torch.cat(parts).expand(shape).clone()
        return found

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if `by` is not defined on this grid."""
        self.by.check(grid)

    def instead(self, grid: tuple[int, ...]) -> str:
        """Lists that its weights choose."""
        return f"a gate for the lists of {self.by}, which has a plan"

    def choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        parameters: Mapping[str, torch.Tensor],
    ) -> Routes:
        """The key blocks that each head lists for each query block.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            layout: The tokens.
            key_mask: bool [B, S], or None.
            parameters: `query` and `key`.

        Raises:
            ValueError: If one of them is missing.
        """
        missing = [name for name in ("query", "key") if name not in parameters]
        if missing:
            raise ValueError(
                f"{self} lists blocks by trained weights, and {' and '.join(missing)} are missing: pass parameters= or "
                "apply(..., weights=) with a file that holds them"
            )
        with torch.no_grad():
            scores, seen = self.scores(q, k, layout, key_mask, parameters)
            return self.by.pick(scores, seen, self.by.blocks(layout.grid))

    def scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        parameters: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Seen]:
        """Scores of all pairs of blocks [B, H, rows, columns], and which blocks take part."""
        at, blocks = inner(layout), self.by.blocks(layout.grid)
        valid = None if key_mask is None else key_mask[:, at]
        k = repeated(k, q.shape[2])
        found, there = [], []
        for name, x, side in (("query", q, blocks.sides[0]), ("key", k, blocks.sides[1])):
            pooled, count = _pools(x[:, at], getattr(self, name).split("+"), side, valid)
            weight = parameters[name].to(pooled.dtype)
            found.append(torch.einsum("bnhp,hpd->bhnd", pooled, weight))
            there.append(count > 0)
        seen = Seen() if valid is None else Seen(there[0], there[1])
        return self.dim**-0.5 * found[0] @ found[1].transpose(2, 3), seen


def _pools(
    x: torch.Tensor, names: list[str], side: tuple[tuple[int, ...], tuple[int, ...]], valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools of the valid tokens of each block, one after the other [B, blocks, H, pools * D]; how many are valid."""
    mean, count = means(x, *side, 1, valid)
    low, high = bounds(x, *side, valid)
    made = {"avg": mean[:, :, 0], "min": low, "max": high}
    return torch.cat([made[name] for name in names], -1), count[..., 0]
