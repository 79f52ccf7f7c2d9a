"""Patterns around any other, which change what goes into its attention or what comes out: gates and temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.around import AroundPattern
from visattn.patterns.base import Pattern
from visattn.patterns.dense import Dense
from visattn.patterns.values import is_number, real_number

if TYPE_CHECKING:
    import torch


class Wrapped(AroundPattern):
    """The attention of another pattern, whatever kind it is, with learned factors per head before or after it.

    Attributes:
        of: The other pattern.
    """

    # Its factors are maps of the channels themselves, and 1 at first: it needs weights where the pattern inside does.
    of_products: ClassVar[bool] = False

    def parse_of(self) -> str:
        """See `AroundPattern.parse_of`.

        Raises:
            ValueError: If it merges tokens, or is wrapped in the same way already.
        """
        where = super().parse_of()
        inside = self.of
        while isinstance(inside, AroundPattern):
            if type(inside) is type(self):
                raise ValueError(f"{where} is {self.name} already, and parameters of both have the same names")
            inside = inside.of
        return where

    @property
    def learnable(self) -> bool:
        """Always: its factors."""
        return True

    def instead(self, grid: tuple[int, ...]) -> str:
        """The pattern inside with factors."""
        return f"{self.of} with learned factors"

    def own_shapes(self, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its own parameters by name."""
        raise NotImplementedError

    def outer(self, name: str) -> str:
        """What a parameter of the pattern inside is called: as there, behind that pattern's name if one of these is."""
        return f"{self.of.name}_{name}" if name in self.own_shapes(1, 1) else name

    def inner_parameters(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the pattern inside, as it calls them."""
        own = self.own_shapes(1, 1)
        renamed = {self.outer(name): name for name in own}
        return {renamed.get(name, name): value for name, value in parameters.items() if name not in own}

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Its own, and those of the pattern inside."""
        inside = self.of.parameter_shapes(heads, head_dim, grid)
        return self.own_shapes(heads, head_dim) | {self.outer(name): shape for name, shape in inside.items()}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Zeros, so that every factor is what it is for any token; and those of the pattern inside."""
        import torch

        own = {
            name: torch.zeros(shape, dtype=torch.float32, device="cpu")
            for name, shape in self.own_shapes(heads, head_dim).items()
        }
        inside = self.of.initial_parameters(heads, head_dim, grid)
        return own | {self.outer(name): value for name, value in inside.items()}


# Gates nearer to shut or open have no logit that engines could hold, or divide by what is no number in float32.
LEAST_OPEN = 1e-6


@dataclass(frozen=True)
class Gated(Wrapped):
    """out_i = sigmoid(w . q_i + b) out'_i per head, with the output out' of any other pattern.

    A head that has nothing to add for a token closes its gate, and needs no logits at extremes for it: models trained
    so lose little in 8 bits. Source: Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping
    Attention Heads Do Nothing" (NeurIPS 2023), section 4.2. There the gate reads a head's part of what the module gets;
    a call of attention gets the head's query instead, a linear map of that (rotated and normalised as the model does).

    `gate_weight` [H, D] is 0 at first and `gate_bias` [H], which is added to the logit of `init`, too. With `rescale`
    the gate is divided by `init`, so that training starts from the pattern inside exactly.

    Attributes:
        of: The other pattern.
        init: What the gates are at first, between 0 and 1 and no nearer to them than 1e-6.
        rescale: Whether gates are divided by `init`, as for fine-tuning; without it a model is trained with them anew.

    Raises:
        ValueError: If `of` is no pattern of queries and keys, or `init` is not between 0 and 1.
    """

    of: Pattern = field(default_factory=Dense)
    init: float = 0.5
    rescale: bool = True

    name: ClassVar[str] = "gated"

    def __post_init__(self) -> None:
        self.parse_of()
        if not is_number(self.init) or not LEAST_OPEN <= self.init <= 1 - LEAST_OPEN:
            raise ValueError(
                f"init={self.init!r} must be a number between 0 and 1, no nearer to them than {LEAST_OPEN}: what the "
                "gates are at first"
            )
        object.__setattr__(self, "init", real_number(self.init))
        if not isinstance(self.rescale, bool):
            raise ValueError(f"rescale={self.rescale!r} must be true or false")

    def own_shapes(self, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """`gate_weight` [H, D] and `gate_bias` [H]."""
        return {"gate_weight": (heads, head_dim), "gate_bias": (heads,)}

    @property
    def level(self) -> float:
        """The logit of `init`."""
        return math.log(self.init / (1 - self.init))


@dataclass(frozen=True)
class Selective(Wrapped):
    """Another pattern's attention of t(q_i) q_i, k_j and s(v_j) v_j: temperatures per token, learned per head.

        t(q) = 1 + tanh(w . q + b) + c ln N
        s(v) = 1 + tanh(u . v + e)

    with the number N of keys of a sample that are valid. Every pattern and engine is exact with them, since they are
    outside of the softmax. c ln N keeps the attention as sharp on longer sequences, other resolutions among them.

    Source: Zhang et al., "Selective Attention: Enhancing Transformer through Principled Context Control" (NeurIPS
    2024), from its description: its released code has the part of the position alone, with ln of the number of keys
    that a causal query sees and a factor between 0 and 1 in the place of c. On a grid every query has as many keys, so
    that number is a constant here. The paper's token part is a small network of the module's input; here it reads the
    query or value of a head, which are linear maps of that. Where a model normalises its queries, `t` follows the norm.

    All parameters are 0 at first, so that training starts from the pattern inside: `query_weight` [H, D],
    `query_bias`, `query_length` (c) [H], `value_weight` [H, D] and `value_bias` [H]. Where key heads are shared, keys
    and values are repeated for the value temperatures.

    Attributes:
        of: The other pattern.
        values: Whether values have temperatures too.

    Raises:
        ValueError: If `of` is no pattern of queries and keys.
    """

    of: Pattern = field(default_factory=Dense)
    values: bool = True

    name: ClassVar[str] = "selective"

    def __post_init__(self) -> None:
        self.parse_of()
        if not isinstance(self.values, bool):
            raise ValueError(f"values={self.values!r} must be true or false")

    def own_shapes(self, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Those of `t`, and with `values` those of `s`."""
        query = {"query_weight": (heads, head_dim), "query_bias": (heads,), "query_length": (heads,)}
        return query | ({"value_weight": (heads, head_dim), "value_bias": (heads,)} if self.values else {})
