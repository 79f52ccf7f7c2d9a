"""What every head of a model looks at, in a few numbers each, and which heads bear which pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.attend import attention
from visattn.layout import Layout
from visattn.maps.measures import kept, selecting, spread
from visattn.patterns import ListedPattern, Pattern, parse
from visattn.plans import plan
from visattn.recorded import Recorded

# Shares of dense attention that candidates for tuning keep.
MASSES = (0.8, 0.9, 0.95)
# Queries whose outputs tell how alike heads are.
COMPARED = 128
# Share of the queries of a head that keep at least what `Site.least` says.
LEAST = 0.05


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
        kept: Mass of dense attention that each pattern keeps, by its text.
        least: What 95 % of the queries keep of it at least.
        hops: The same mass for windows of 2 k + 1 tokens an axis, by k.
        importance: How much the output moves with the head, see `gradient`; None where it was not asked for.
    """

    site: str
    layout: Layout
    mass: torch.Tensor
    distance: torch.Tensor
    offset: torch.Tensor
    entropy: torch.Tensor
    kept: Mapping[str, torch.Tensor]
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
        for name in ("kept", "least"):
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
            mass: What a head has to keep of its dense attention, in the mean over its queries.

        Returns:
            Text of a pattern for each head, "dense" where none keeps enough, by module.

        Raises:
            ValueError: If the mass is out of range.
        """
        if not 0 < mass <= 1:
            raise ValueError(f"mass={mass} must be the share of dense attention that a head keeps, above 0 to 1")
        found = {}
        for site in self.sites:
            heads = []
            for head in range(site.heads):
                good = [text for text in self.patterns if text in site.kept and float(site.kept[text][head]) >= mass]
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
            Texts, each once.
        """
        found = dict.fromkeys(self.patterns)
        for mass in masses:
            found |= dict.fromkeys(self.schedule(mass).values())
        found.pop("dense", None)
        return list(found)

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


def overview(
    calls: Sequence[Recorded],
    patterns: Sequence[Pattern | str] = (),
    *,
    importance: Mapping[str, torch.Tensor] | None = None,
    hops: bool = True,
) -> Overview:
    """Locality, entropy, kept mass and importance of every head, exactly and without a map of S x S.

    Args:
        calls: One call of each module: `visattn.maps.calls`, or what `visattn record` wrote.
        patterns: Candidates that select keys; each is looked at where its grid fits.
        importance: What `gradient` gave, or a field of what `pruning` gave, by module.
        hops: Whether windows of growing size are looked at too.

    Raises:
        ValueError: If there is no call, or a pattern is not softmax over some keys or fits no call.
    """
    if not calls:
        raise ValueError("there is no call to look at: record some with visattn.maps.calls or visattn record")
    density = _densities(calls, patterns)
    importance = importance or {}
    sites = tuple(_site(call, tuple(density), importance.get(call.site), hops) for call in calls)
    same = len({call.q.shape[1] for call in calls}) == 1
    return Overview(sites, density, _similarity(calls) if same else None)


def hop_windows(grid: tuple[int, ...]) -> dict[int, str]:
    """Windows of 2 k + 1 tokens an axis, for k = 0, 1, 2, 4, ... as long as they do not cover the grid."""
    found, k = {}, 0
    while 2 * k + 1 < max(grid):
        sides = "x".join(str(2 * k + 1) for _ in grid)
        found[k] = f"na(window={sides})" if len(grid) > 1 else f"na(window={2 * k + 1})"
        k = max(1, 2 * k)
    return found


def _densities(calls: Sequence[Recorded], patterns: Sequence[Pattern | str]) -> dict[str, float]:
    """Density of each candidate, the sparsest first."""
    found = {}
    for pattern in map(parse, patterns):
        why: ValueError | None = None
        for call in calls:
            try:
                chosen = selecting(pattern, call.layout.grid)
            except ValueError as error:
                why = error
                continue
            assert isinstance(chosen, ListedPattern)
            found[str(pattern)] = 1.0 if chosen.covers(call.layout.grid) else plan(chosen, call.layout).density
            break
        else:
            assert why is not None
            raise why
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _site(call: Recorded, patterns: Sequence[str], importance: torch.Tensor | None, hops: bool) -> Site:
    seen = spread(call)
    inner = seen.grid
    there = torch.ones(call.q.shape[0], call.layout.tokens, 1, dtype=seen.lse.dtype, device=seen.lse.device)
    if call.key_mask is not None:
        there = call.key_mask[:, inner, None].to(there)

    def mean(values: torch.Tensor) -> torch.Tensor:
        weight = there if values.ndim == 3 else there[..., None]
        return ((values * weight).sum((0, 1)) / weight.sum((0, 1)).clamp(min=1)).cpu()

    masses, least = {}, {}
    for text in patterns:
        try:
            found = kept(call, text, seen.lse)[:, inner]
        except ValueError:
            # Levels of one model have different grids: a candidate is looked at where it is defined.
            continue
        masses[text] = mean(found)
        some = found[there[..., 0] > 0].sort(0).values
        least[text] = some[int(LEAST * len(some))].cpu()
    own = hop_windows(call.layout.grid) if hops else {}
    # The mean of squares, and then its root: E|x_i - x_j|^2 is what the identity gives.
    distance = (mean(seen.squared) / mean(seen.mass[:, inner]).clamp(min=1e-12)).clamp(min=0).sqrt()
    return Site(
        call.site,
        call.layout,
        mean(seen.mass[:, inner]),
        distance,
        mean(seen.offset),
        mean(seen.entropy[:, inner]),
        masses,
        least,
        {k: mean(kept(call, text, seen.lse)[:, inner]) for k, text in own.items()},
        None if importance is None else importance.detach().float().cpu(),
    )


@torch.no_grad()
def _similarity(calls: Sequence[Recorded]) -> torch.Tensor:
    """Cosines of the Gram matrices of all heads' outputs between some queries, centred: [heads, heads]."""
    rows = []
    for call in calls:
        out = attention(call.q, call.k, call.v, "dense", call.layout, scale=call.scale, key_mask=call.key_mask)
        number = min(COMPARED, call.layout.tokens)
        chosen = torch.arange(number, device=out.device) * call.layout.tokens // number + call.layout.prefix
        some = out[0, chosen].float().transpose(0, 1)
        some = some - some.mean(1, keepdim=True)
        gram = (some @ some.transpose(1, 2)).flatten(1)
        # Heads whose queries all get the same are like no other: rounding is no direction.
        least = 1e-5 * out[0, chosen].float().square().sum((0, 2))[:, None]
        rows.append((gram / gram.norm(dim=1, keepdim=True).maximum(least)).cpu())
    found = torch.cat(rows)
    return (found @ found.T).clamp(0, 1)


def _numbers(values: torch.Tensor) -> Any:
    return [[round(float(x), 6) for x in row] if row.ndim else round(float(row), 6) for row in values]
