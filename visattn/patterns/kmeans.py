"""Clusters of queries and of keys by their content, and the clusters of keys that carry most of the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.operands import repeated
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.clusters import Clusters, first_centres, k_means
from visattn.patterns.choice.memory import usable
from visattn.patterns.choice.picks import Seen, bar_of, pick_number
from visattn.patterns.ordered import Clustered, OrderedPattern
from visattn.patterns.values import LARGEST, is_number, real_number, whole_number

# Tokens of a tile at most, and of the smallest one of keys.
TILE, SMALLEST = 64, 16
# Of k-means: clusters have long come to rest.
ITERATIONS = 1000


@dataclass(frozen=True)
class KMeans(OrderedPattern):
    """Each cluster of queries sees the clusters of keys that carry a share `p` of its estimated attention.

    The estimate of a pair of clusters is tokens * exp(scale centre . centre), so that a cluster counts by its size. The
    centres start from valid tokens that are spread over the grid; where a patched pipeline tells its steps, those of
    the last step start the next one, per run, module and half of guidance. Source: Yang et al., "Sparse VideoGen2:
    Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation" (2025).

    Attributes:
        queries: Clusters of queries of a head.
        keys: Clusters of keys of a head.
        p: Share of the attention, above 0 and at most 1; the cluster that crosses it is seen.
        floor: Share of the clusters of keys that is seen anyway, rounded down.
        start: Iterations from spread tokens, at most 1000.
        step: Iterations from the centres of the last step.

    Raises:
        ValueError: If a number is out of range, or there are more clusters than tokens.
    """

    queries: int = 300
    keys: int = 1000
    p: float = 0.9
    floor: float = 0.1
    start: int = 50
    step: int = 2

    name: ClassVar[str] = "kmeans"

    def __post_init__(self) -> None:
        for name, high in (("queries", LARGEST), ("keys", LARGEST), ("start", ITERATIONS), ("step", ITERATIONS)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1, high=high))
        if not is_number(self.p) or not 0 < self.p <= 1:
            raise ValueError(f"p={self.p!r} must be a share of the attention, above 0 and at most 1")
        if not is_number(self.floor) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor!r} must be a share of the clusters, from 0 to 1")
        object.__setattr__(self, "p", real_number(self.p))
        object.__setattr__(self, "floor", real_number(self.floor))

    @property
    def remembers(self) -> bool:
        """Always: centres are kept where the step is known."""
        return True

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if there are more clusters than tokens."""
        tokens = Layout(grid).tokens
        for name in ("queries", "keys"):
            if getattr(self, name) > tokens:
                raise ValueError(
                    f"{name}={getattr(self, name)} clusters are more than the {tokens} tokens of grid {grid}: give at "
                    f"most {tokens}, like kmeans({name}={max(1, tokens // 8)})"
                )

    def groups(self, layout: Layout) -> tuple[int, int]:
        """Clusters."""
        return self.queries, self.keys

    def tiles(self, layout: Layout) -> tuple[int, int]:
        """Tiles that clusters of average size fill for the most part."""
        found = []
        for clusters, least in ((self.queries, SMALLEST), (self.keys, SMALLEST)):
            size = least
            while size < TILE and 4 * size * clusters <= layout.tokens:
                size *= 2
            found.append(size)
        return found[0], found[1]

    def expected(self, layout: Layout) -> float:
        """`floor`, or half of what is not left out: how many clusters carry `p` is known only with q and k."""
        return max(self.floor, 0.25 * self.p)

    def passes(self) -> int:
        """`step`, and once for the groups themselves."""
        return self.step + 1

    def cluster(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Clustered:
        """Clusters of queries and keys of each head, and who sees whom."""
        at, heads = inner(layout), q.shape[2]
        with torch.no_grad():
            valid = None if key_mask is None else key_mask[:, at]
            query, keys = self._clusters(q[:, at].transpose(1, 2), k[:, at].transpose(1, 2), layout, valid)
            ids, centres, sizes = (repeated(t, heads, 1) for t in keys)
            factor = q.shape[3] ** -0.5 if scale is None else scale
            # An empty cluster has no weight.
            scores = factor * query.centres @ centres.transpose(2, 3) + sizes.log()[:, :, None]
            return Clustered(query.ids, ids, self._listed(scores))

    def _clusters(
        self, q: torch.Tensor, k: torch.Tensor, layout: Layout, valid: torch.Tensor | None
    ) -> tuple[Clusters, Clusters]:
        """Clusters of queries and keys [B, heads, tokens, D], from the last step's centres where there are any."""
        place, own = usable(), (self, layout, q.shape, k.shape, q.device)
        before = None if place is None or place.memory is None else place.memory.get((place.key, own))
        found = []
        for i, (x, number) in enumerate(((q, self.queries), (k, self.keys))):
            begin = first_centres(x, number, valid) if before is None else before[i]
            found.append(k_means(x, begin, self.start if before is None else self.step, valid))
        if place is not None and place.memory is not None:
            place.memory.put((place.key, own), tuple(each.centres for each in found))
        return found[0], found[1]

    def _listed(self, scores: torch.Tensor) -> torch.Tensor:
        """The clusters of keys that carry `p`, and the best ones that are seen anyway."""
        value, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = torch.nn.functional.pad(value.cumsum(-1)[..., :-1], (1, 0))
        keep = (before <= bar_of(self.p)) & (value > 0)
        listed = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(3, order, keep)
        least = int(self.floor * scores.shape[3] + 1e-9)
        return listed | pick_number(scores, Seen(), None, least) if least else listed
