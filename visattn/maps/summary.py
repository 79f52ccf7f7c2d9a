"""From recorded calls to an overview of all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from visattn.attend import attention
from visattn.given import mapping, several, switch, tensor
from visattn.maps.measures import caught, selecting, spread
from visattn.maps.overview import Overview, Site
from visattn.patterns import ListedPattern, Pattern, parse
from visattn.patterns.choice.stratified import sampled_rows
from visattn.plans import plan
from visattn.recorded import Recorded, check_recorded

# Queries whose outputs tell how alike heads are.
COMPARED = 128
# Share of the queries of a head of which at least what `Site.least` says is caught.
LEAST = 0.05


def overview(
    calls: Sequence[Recorded],
    patterns: Sequence[Pattern | str] = (),
    *,
    importance: Mapping[str, torch.Tensor] | None = None,
    hops: bool = True,
) -> Overview:
    """Locality, entropy, what patterns catch, and importance of every head, exactly and without a map of S x S.

    Args:
        calls: One call of each module: `visattn.maps.calls`, or what `visattn record` wrote.
        patterns: Candidates that select keys; each is looked at where its grid fits.
        importance: What `gradient` gave, or a field of what `pruning` gave, by module.
        hops: Whether windows of growing size are looked at too.

    Raises:
        ValueError: If there is no call, or a pattern is not softmax over some keys or fits no call.
    """
    check_recorded(calls, many=True)
    if not calls:
        raise ValueError("there is no call to look at: record some with visattn.maps.calls or visattn record")
    switch(hops, "hops")
    density = _densities(calls, several(patterns, "patterns", "patterns or texts, like ['na(window=9x9)']"))
    heads = {call.site: call.q.shape[2] for call in calls}
    importance = {} if importance is None else mapping(importance, "importance", "from modules to values [H]")
    for site, values in importance.items():
        if list(tensor(values, f"importance of {site}", "[H]").shape) != [heads.get(site, values.numel())]:
            raise ValueError(
                f"importance of {site} is {list(values.shape)} and must be [{heads[site]}], a value a head"
            )
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

    shares, least = {}, {}
    for text in patterns:
        try:
            found = caught(call, text, seen.lse)[:, inner]
        except ValueError:
            # Levels of one model have different grids: a candidate is looked at where it is defined.
            continue
        shares[text] = mean(found)
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
        shares,
        least,
        {k: mean(caught(call, text, seen.lse)[:, inner]) for k, text in own.items()},
        None if importance is None else importance.detach().float().cpu(),
    )


@torch.no_grad()
def _similarity(calls: Sequence[Recorded]) -> torch.Tensor:
    """Cosines of the Gram matrices of all heads' outputs between some queries, centred: [heads, heads]."""
    rows = []
    for call in calls:
        out = attention(call.q, call.k, call.v, "dense", call.layout, scale=call.scale, key_mask=call.key_mask)
        chosen = sampled_rows(call.layout, COMPARED, out.device)
        some = out[0, chosen].float().transpose(0, 1)
        some = some - some.mean(1, keepdim=True)
        gram = (some @ some.transpose(1, 2)).flatten(1)
        # Heads whose queries all get the same are like no other: rounding is no direction.
        least = 1e-5 * out[0, chosen].float().square().sum((0, 2))[:, None]
        rows.append((gram / gram.norm(dim=1, keepdim=True).maximum(least)).cpu())
    found = torch.cat(rows)
    return (found @ found.T).clamp(0, 1)
