"""What every head of a model looks at, in a few numbers each, and which heads bear which pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.given import real, several
from visattn.layout import Layout
from visattn.patterns import parse
from visattn.tuning.places import AT

# Shares of dense attention that candidates for tuning catch.
MASSES = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Site:
    """The heads of one attention module: means over samples and the queries of the grid, [H] each.

    Attributes:
        site: Path of the module.
        layout: Where its tokens sit.
        mass: Share of the attention that is on the grid.
        distance: Root mean squared distance of query and keys on the grid, in shares of the grid's diagonal.
        offset: Mean key position minus query position, likewise [H, dims].
        entropy: In shares of the logarithm of the number of keys.
        caught: Share of dense attention that each pattern catches, by its text.
        least: What is caught of 95 % of the queries at least.
        hops: The same for windows of 2 k + 1 tokens an axis, by k.
        importance: How much the output moves with the head, see `gradient`; None where it was not asked for.
    """

    site: str
    layout: Layout
    mass: torch.Tensor
    distance: torch.Tensor
    offset: torch.Tensor
    entropy: torch.Tensor
    caught: Mapping[str, torch.Tensor]
    least: Mapping[str, torch.Tensor]
    hops: Mapping[int, torch.Tensor] = field(default_factory=dict)
    importance: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """How many there are."""
        return len(self.mass)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        found: dict[str, Any] = {"site": self.site, "grid": list(self.layout.grid)}
        found |= {"prefix": self.layout.prefix, "suffix": self.layout.suffix}
        for name in ("mass", "distance", "offset", "entropy"):
            found[name] = _numbers(getattr(self, name))
        for name in ("caught", "least"):
            found[name] = {text: _numbers(values) for text, values in getattr(self, name).items()}
        found["hops"] = {str(k): _numbers(values) for k, values in self.hops.items()}
        return found | {"importance": None if self.importance is None else _numbers(self.importance)}


@dataclass(frozen=True)
class Overview:
    """Every head of a model.

    Attributes:
        sites: The modules, in the order of their calls.
        patterns: The candidates, from the one with the fewest visible pairs to the one with most, with their density at
            the first module on whose grid they are defined.
        similarity: How alike the outputs of two heads are: the cosine of their Gram matrices between sampled queries
            (linear CKA, which does not depend on each head's own basis) [heads, heads]; None where sequences differ.
    """

    sites: tuple[Site, ...]
    patterns: Mapping[str, float]
    similarity: torch.Tensor | None = None

    def table(self, mass: float = 0.9) -> dict[str, list[str]]:
        """The sparsest pattern that each head of each module bears.

        Args:
            mass: Share of a head's dense attention that a pattern has to catch, in the mean over its queries.

        Returns:
            Text of a pattern for each head, "dense" where none catches enough, by module.

        Raises:
            ValueError: If the mass is out of range.
        """
        must = "the share of a head's dense attention that is caught, above 0 to 1"
        mass = real(mass, "mass", must, lambda x: 0 < x <= 1)
        found = {}
        for site in self.sites:
            heads = []
            for head in range(site.heads):
                good = [
                    text for text in self.patterns if text in site.caught and float(site.caught[text][head]) >= mass
                ]
                heads.append(good[0] if good else "dense")
            found[site.site] = heads
        return found

    def schedule(self, mass: float = 0.9) -> dict[str, str]:
        """What `visattn.apply` takes to give each head of each module the sparsest pattern that it bears.

        Args:
            mass: As in `table`.

        Returns:
            Module to pattern: one for all heads, or `perhead(...)`.
        """
        return {site: of_heads(heads) for site, heads in self.table(mass).items()}

    def candidates(self, masses: Sequence[float] = MASSES) -> list[str]:
        """Patterns for `visattn tune --candidates`: those looked at, and those of heads that `schedule` makes.

        Args:
            masses: As in `table`, one schedule each.

        Returns:
            Lines, each once: what is for heads of some modules has their names, `perhead(...) @ blocks.3.attn`.
        """
        found: dict[str, list[str]] = {text: [] for text in self.patterns}
        for mass in several(masses, "masses", "shares of dense attention, like [0.8, 0.9]"):
            for site, text in self.schedule(mass).items():
                if text not in self.patterns and site not in found.setdefault(text, []):
                    found[text].append(site)
        found.pop("dense", None)
        return [f"{text}{AT}{', '.join(sites)}" if sites else text for text, sites in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"patterns": dict(self.patterns), "sites": [site.to_dict() for site in self.sites]}


def of_heads(heads: Sequence[str]) -> str:
    """One pattern for heads that have these: the pattern of all, or `perhead(...)` with neighbours as ranges."""
    if len(set(heads)) == 1:
        return heads[0]
    parts, first = [], 0
    for head in range(1, len(heads) + 1):
        if head == len(heads) or heads[head] != heads[first]:
            parts.append(f"{first if head == first + 1 else f'{first}-{head - 1}'}: {heads[first]}")
            first = head
    return str(parse(f"perhead(heads={{{', '.join(parts)}}})"))


def _numbers(values: torch.Tensor) -> Any:
    return [[round(float(x), 6) for x in row] if row.ndim else round(float(row), 6) for row in values]
