"""What every pattern is; its kinds are in `visattn.patterns.kinds`."""

from __future__ import annotations

import dataclasses
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from visattn.patterns.values import as_text


class _Written(ABCMeta):
    """Gives every pattern its text: the tracer of torch.compile reads an attribute, and cannot follow `str`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        object.__setattr__(made, "_written", str(made))
        return made


class Pattern(metaclass=_Written):
    """A frozen dataclass that says which keys of a grid each query of that grid sees, or what stands in for that.

    Backends and adapters ask for its kind, one of the classes of `visattn.patterns.kinds`:

        StaticPattern     a list of key tiles for each query tile, known from the grid alone
        RoutedPattern     a list of key tiles that is computed from q and k at run time
        ComposedPattern   no list of its own: sums over all keys, or parts around an inner listed pattern
        MergingPattern    changes the tokens that are projected to q, k and v

    Equal patterns compare equal, print alike and are what `parse(str(pattern))` gives: `__post_init__` puts every
    parameter in one form, for which `visattn.patterns.values` has the means.

    Attributes:
        name: What `parse` and `str` call it.
    """

    name: ClassVar[str]
    # Its text, `str` of it.
    _written: str
    # Whether its methods take a second grid, that of the keys, where queries and keys are on grids that differ.
    two_grids: ClassVar[bool] = False

    @property
    def learnable(self) -> bool:
        """Whether it has parameters to train."""
        return False

    @property
    def needs_steps(self) -> bool:
        """Whether it keeps something from denoising step to step, so that it has to know them."""
        return False

    @property
    def stepless(self) -> str:
        """What to do where steps are needed and nobody knows them, for errors."""
        return "leave every out"

    @property
    def remembers(self) -> bool:
        """Whether it keeps something from step to step where they are known."""
        return self.needs_steps

    @property
    def joins_heads(self) -> bool:
        """Whether what a head attends to depends on which other heads there are, or on their queries and keys."""
        return False

    @property
    def needs_weights(self) -> bool:
        """Whether it means nothing before its parameters are trained."""
        return False

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of its learnable parameters by name.

        Args:
            heads: Query heads.
            head_dim: Channels per head.
            grid: Tokens per axis; -1 for an axis whose length is not known yet. A parameter whose shape would
                depend on such an axis is left out.
        """
        return {}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The values that missing parameters stand for, in float32: zeros; arguments as in `parameter_shapes`."""
        shapes = self.parameter_shapes(heads, head_dim, grid)
        return {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}

    @abstractmethod
    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the pattern is not defined on this grid."""

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every token of this grid sees every other and nothing else: dense attention is the same."""
        return False

    def _constant(self, function: Callable[..., Any], written: str, *given: Any) -> Any:
        """function(pattern, *given), which the tracer of torch.compile runs and takes as a constant.

        See `visattn.patterns.traced.constant`, which passes the text.
        """
        return function(self, *given)

    # What `torch.compiler.assume_constant_result` does, without importing the compiler (a second) for those who do not
    # compile.
    _constant._dynamo_marked_constant = True

    def __str__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            # By their texts: a count of 1 is another parameter than a share of 1.0.
            if as_text(value) != as_text(field.default):
                parts.append(f"{field.name}={as_text(value)}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name


class ByText(Pattern):
    """Patterns that are equal if they are written alike; their dataclasses are made with `eq=False`.

    A share of 1.0 is all and a count of 1 is one: numbers that are equal, patterns that are not.
    """

    def __eq__(self, other: object) -> bool:
        return other is self or (type(other) is type(self) and other._written == self._written)

    def __hash__(self) -> int:
        # Every call of attention looks things up by its pattern.
        return hash(self._written)
