"""Attention inside clusters of equal size around trained centroids (Routing Transformer)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.given import real, tensor
from visattn.layout import Layout, check_layout
from visattn.operands import repeated, wide_dtype
from visattn.patterns.choice.blocks import inner
from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.values import check_many, whole_number

# Of queries and keys.
AXES = "[B, S, heads, D]"


@dataclass(frozen=True)
class Centroids(ComposedPattern):
    """Each centroid of a head takes the queries and the keys that are nearest to it, and those attend to each other.

    Nearness is the cosine. A query has the mean of its outputs around the centroids that took it, over their number and
    1e-5 more, and zeros where none did; so this is for models that are trained with it. Dense tokens see everything,
    and are seen around every centroid; padding is taken last and seen by nobody. Source: Roy et al., "Efficient
    Content-Based Sparse Attention with Routing Transformers" (TACL 2021), not causal; its centroids follow queries and
    keys, see `followed`.

    Attributes:
        clusters: Centroids of a head.
        window: Queries, and keys, that each takes; at most all.

    Raises:
        ValueError: If a number is out of range.
    """

    clusters: int = 16
    window: int = 256

    name: ClassVar[str] = "centroids"
    # Nearness is of the channels themselves.
    of_products: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("clusters", "window"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1))

    @property
    def needs_weights(self) -> bool:
        """Always: centroids that followed no queries and keys lie anywhere."""
        return True

    @property
    def learnable(self) -> bool:
        """Always."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`centroids` [H, clusters, D]; their lengths mean nothing."""
        return {"centroids": (heads, self.clusters, head_dim)}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Random directions, always the same."""
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(heads, self.clusters, head_dim, generator=generator, dtype=torch.float32, device="cpu")
        return {"centroids": torch.nn.functional.normalize(found, dim=-1)}

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if there are more clusters than a grid of its size can have a use for."""
        check_many(self.clusters, math.prod(grid), f"clusters={self.clusters}")

    def instead(self, grid: tuple[int, ...]) -> str:
        """Attention among tokens that trained centroids take."""
        return f"attention inside {self.clusters} clusters that trained centroids make, each of any tokens"

    def taken(
        self,
        x: torch.Tensor,
        layout: Layout,
        centroids: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The grid tokens that each centroid takes, in their order: int64 [B, H, clusters, window].

        Args:
            x: Queries or keys [B, S, H, D].
            layout: The tokens.
            centroids: Directions [H, clusters, D].
            key_mask: bool [B, S], or None.
        """
        with torch.no_grad():
            near = _nearness(x[:, inner(layout)], centroids)
            if key_mask is not None:
                near = near.masked_fill(~key_mask[:, None, None, inner(layout)], -math.inf)
            number = min(self.window, layout.tokens)
            return near.sort(dim=-1, descending=True, stable=True).indices[..., :number].sort(dim=-1).values


def _nearness(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Cosines of tokens [B, T, H, D] and centroids [H, clusters, D], in float32 at least: [B, H, clusters, T]."""
    dtype = wide_dtype(x)
    unit, directions = (torch.nn.functional.normalize(t.to(dtype), dim=-1) for t in (x, centroids))
    return torch.einsum("bthd,hcd->bhct", unit, directions)


def followed(
    centroids: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    decay: float = 0.999,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Centroids a step later: they move toward the mean direction of the queries and keys that are nearest to each.

    Call it once per training step with what a call of attention got (`handle.watch`), and put the result in the place
    of the parameter.

    Args:
        centroids: Directions [H, clusters, D].
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        layout: The tokens; dense ones move nothing.
        decay: Share of the old direction that stays, from 0 to 1; centroids that are nearest to nobody stay where
            they are.
        key_mask: bool [B, S], False for tokens that move nothing, or None.

    Returns:
        Unit vectors like `centroids`.

    Raises:
        ValueError: If `decay` is no share, or centroids, queries, keys and layout do not fit.
    """
    decay = real(decay, "decay", "a share of the old centroids, from 0 to 1", lambda x: 0 <= x <= 1)
    check_layout(layout)
    for name, given, what in (("centroids", centroids, "[H, clusters, D]"), ("q", q, AXES), ("k", k, AXES)):
        if tensor(given, name, what).ndim != what.count(",") + 1 or not given.is_floating_point():
            raise ValueError(f"{name} {list(given.shape)} of {given.dtype} must be floating-point {what}")
    if centroids.ndim != 3 or centroids.shape[::2] != q.shape[2:]:
        raise ValueError(f"centroids {list(centroids.shape)} must be [H, clusters, D] of queries {list(q.shape)}")
    if not q.shape[1] == k.shape[1] == layout.length:
        raise ValueError(
            f"queries {list(q.shape)} and keys {list(k.shape)} must have the {layout.length} tokens of {layout}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in B and D, and k's heads divide q's")
    if key_mask is not None and list(tensor(key_mask, "key_mask", "[B, S]").shape) != list(q.shape[:2]):
        raise ValueError(f"key_mask {list(key_mask.shape)} must be {list(q.shape[:2])}: False for tokens to leave out")
    at, heads = inner(layout), q.shape[2]
    with torch.no_grad():
        x = torch.cat([q[:, at], repeated(k[:, at], heads)], 1)
        near = _nearness(x, centroids).argmax(2)
        own = torch.nn.functional.one_hot(near, centroids.shape[1]).to(wide_dtype(x))
        if key_mask is not None:
            own = own * key_mask[:, at].repeat(1, 2)[:, None, :, None]
        unit = torch.nn.functional.normalize(x.to(own.dtype), dim=-1)
        total = torch.nn.functional.normalize(torch.einsum("bhtc,bthd->hcd", own, unit), dim=-1)
        old = torch.nn.functional.normalize(centroids.to(own.dtype), dim=-1)
        new = torch.nn.functional.normalize(decay * old + (1 - decay) * total, dim=-1)
        return torch.where(own.sum((0, 2))[..., None] > 0, new, old).to(centroids.dtype)
