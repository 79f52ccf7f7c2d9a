"""Sparse softmax attention for the visible keys, linear attention for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.composition import Composition
from visattn.patterns.kinds import StaticPattern
from visattn.patterns.linear import check_feature, initial_maps, map_shapes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SparseLinear(Composition):
    """out_i = soft_i + mix (lin_i - soft_i): two attentions over disjoint keys, mixed per head.

    soft_i is softmax attention over the keys that `sparse` shows query i (with its pooled keys, if it has any), lin_i
    linear attention as in `linear(feature=...)` over exactly the other tokens, hidden tile or hidden token of a
    visited tile alike. A query without other visible tokens (dense tokens see all) keeps out_i = soft_i. `mix` is
    learnable per head and 0 at first, so that training starts from the sparse pattern.

    Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention"
    (2025), section 4, with three differences: the pattern is fixed instead of predicted from block means, no block is
    left out altogether, and a number per head mixes the two instead of a projection of the linear part.

    Sums are float32 at least. Tested in bfloat16 with queries and keys up to 80 in absolute value.

    Attributes:
        sparse: Who sees whom by softmax, a pattern that is a list of key tiles.
        feature: Name of the feature map of the linear part.

    Raises:
        ValueError: If `sparse` is no list of tiles that is known without q and k, or there is no such feature map.
    """

    sparse: StaticPattern
    feature: str = "elu"

    name: ClassVar[str] = "sparselinear"
    of_products: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.parse_sparse()
        check_feature(self.feature)

    def __str__(self) -> str:
        return f"{self.name}(sparse={self.sparse}, feature={self.feature})"

    @property
    def learnable(self) -> bool:
        """Always: the mix per head."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`mix` [H]; and those of the feature map and the sparse pattern."""
        own = {"mix": (heads,)} | map_shapes(self.feature, heads, head_dim)
        return own | self.sparse.parameter_shapes(heads, head_dim, grid)

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """No linear part."""
        import torch

        own = {"mix": torch.zeros(heads, dtype=torch.float32, device="cpu")} | initial_maps(
            self.feature, heads, head_dim
        )
        return own | self.sparse.initial_parameters(heads, head_dim, grid)
