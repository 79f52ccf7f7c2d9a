"""Sigmoid attention over the visible keys of any pattern that is a list of key tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.composition import Composition
from visattn.patterns.dense import Dense
from visattn.patterns.kinds import StaticPattern
from visattn.patterns.values import is_number, real_number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sigmoid(Composition):
    """out_i = sum_j sigmoid(scale q_i . k_j + b_i) v_j over the keys j that `sparse` shows query i; no normaliser.

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024), section 3,
    with b_i = -log(number of visible keys of i) as proposed there (pooled keys of clear count), or a constant. A
    learnable offset per head is added, 0 at first. Sums are float32 at least; tested in bfloat16 with queries and keys
    up to 80 in absolute value.

    Attributes:
        sparse: Who sees whom, a pattern that is a list of key tiles.
        bias: The constant b, or None for minus the logarithm of the number of visible keys.

    Raises:
        ValueError: If `sparse` is no list of tiles that is known without q and k, or the bias is not finite.
    """

    sparse: StaticPattern = field(default_factory=Dense)
    bias: float | None = None

    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        self.parse_sparse()
        if self.bias is not None:
            if not is_number(self.bias):
                raise ValueError(f"bias={self.bias!r} must be a finite float32 number, or none for -log(visible keys)")
            object.__setattr__(self, "bias", real_number(self.bias))

    def __str__(self) -> str:
        bias = "" if self.bias is None else f", bias={self.bias!r}"
        return f"{self.name}(sparse={self.sparse}{bias})"

    @property
    def learnable(self) -> bool:
        """Always: the offset per head."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`bias` [H], added to b; and those of the sparse pattern."""
        return {"bias": (heads,)} | self.sparse.parameter_shapes(heads, head_dim, grid)

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """No offset."""
        import torch

        return {"bias": torch.zeros(heads, dtype=torch.float32, device="cpu")} | self.sparse.initial_parameters(
            heads, head_dim, grid
        )
