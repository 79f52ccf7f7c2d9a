"""Attention patterns: which keys each query of a grid sees. One file a pattern."""

from __future__ import annotations

from functools import lru_cache

import torch

from visattn.layout import Layout
from visattn.patterns.agent import Agent
from visattn.patterns.agent_sd import AgentSD
from visattn.patterns.base import Pattern
from visattn.patterns.clear import Clear
from visattn.patterns.dense import Dense
from visattn.patterns.flow import Flow
from visattn.patterns.halo import Halo
from visattn.patterns.linear import Linear
from visattn.patterns.mala import Mala
from visattn.patterns.neighborhood import Neighborhood
from visattn.patterns.radial import Radial
from visattn.patterns.routing import Routing, routed_mask
from visattn.patterns.sigmoid import Sigmoid
from visattn.patterns.sparse_linear import SparseLinear
from visattn.patterns.text import parse_pattern

__all__ = [
    "PATTERNS",
    "Agent",
    "AgentSD",
    "Clear",
    "Dense",
    "Flow",
    "Halo",
    "Linear",
    "Mala",
    "Neighborhood",
    "Pattern",
    "Radial",
    "Routing",
    "Sigmoid",
    "SparseLinear",
    "dense_mask",
    "parse",
    "routed_mask",
]

PATTERNS: tuple[type[Pattern], ...] = (
    Dense,
    Neighborhood,
    Halo,
    Clear,
    Radial,
    Routing,
    Agent,
    AgentSD,
    Linear,
    Flow,
    Mala,
    SparseLinear,
    Sigmoid,
)


def parse(text: str | Pattern) -> Pattern:
    """Build the pattern that a text like `na(window=7x7)` names; a pattern passes through.

    Args:
        text: The text, or a pattern.

    Returns:
        The pattern; the same object for the same text.

    Raises:
        ValueError: If the text names an unknown pattern or parameter, or a value is out of range.
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise ValueError(f"pattern {text!r} is a {type(text).__name__}: pass a Pattern or a text like 'na(window=7x7)'")
    return _parsed(text)


# Calls with a text name the same few patterns, once per layer and step.
@lru_cache(maxsize=512)
def _parsed(text: str) -> Pattern:
    return parse_pattern(text, {kind.name: kind for kind in PATTERNS})


def dense_mask(pattern: Pattern | str, layout: Layout) -> torch.Tensor:
    """The truth of a pattern as a mask over all tokens, for small grids.

    Args:
        pattern: A pattern or its text.
        layout: Where the tokens sit.

    Returns:
        bool [S, S + extra] with S = layout.length; entry (i, j) says whether query i sees key j. The extra keys
        are those that the pattern appends (the pooled keys of clear), which dense tokens do not see.

    Raises:
        ValueError: If the pattern is not defined on the grid.
    """
    pattern = parse(pattern)
    pattern.check(layout.grid)
    mask = torch.ones(layout.length, layout.length + pattern.extra_keys(layout.grid), dtype=torch.bool)
    mask[:, layout.length :] = False
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    mask[inner, layout.length :] = True
    mask[inner, inner] = torch.from_numpy(pattern.grid_mask(layout.grid))
    return mask
