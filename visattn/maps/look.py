"""From recorded calls to what a page shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from visattn.layout import Layout
from visattn.maps.heat import plane
from visattn.maps.measures import received
from visattn.maps.rollout import rollout
from visattn.maps.rows import offsets, rows
from visattn.maps.scores import average_drop, confidence_gain, top_share
from visattn.maps.shown import Details
from visattn.operands import wide_dtype
from visattn.patterns import StaticPattern, parse
from visattn.recorded import Recorded
from visattn.tuning.candidates import candidates

# Shares of a map's values by which it is scored.
SHARES = (1.0, 0.5, 0.15)
# Shares of the key blocks that heads choose in the default candidates.
KEPT = (0.05, 0.1, 0.2, 0.4)


def default_patterns(grid: tuple[int, ...]) -> list[str]:
    """Candidates for a grid: windows of several shares of the axes, and blocks chosen by scores."""
    found = [name for name in candidates(grid) if isinstance(parse(name), StaticPattern) and name != "dense"]
    chosen = []
    for keep in KEPT:
        try:
            pattern = parse(f"topk(keep={keep}, rest=drop)")
            pattern.check(grid)
        except ValueError:
            continue
        if not pattern.covers(grid):
            chosen.append(str(pattern))
    return found + chosen


def query_token(query: str | tuple[int, ...] | None, layout: Layout, largest: tuple[int, ...]) -> int:
    """The row of a query in a sequence.

    Args:
        query: "cls" for the first token, or a position on the largest grid of the model; None for its middle.
        layout: Of the sequence.
        largest: That grid: on a coarser one the token at the same place is taken.

    Raises:
        ValueError: If there is no token before the grid, or the position is not on the grid.
    """
    if query == "cls":
        if not layout.prefix:
            raise ValueError(f"query cls is the first token before the grid, and {layout} has none: give a position")
        return 0
    at = tuple(n // 2 for n in largest) if query is None else query
    if isinstance(at, str) or len(at) != len(largest) or any(not 0 <= i < n for i, n in zip(at, largest, strict=True)):
        shown = "x".join(map(str, largest))
        given = query if isinstance(query, str) or query is None else ",".join(map(str, query))
        last = ",".join(str(n - 1) for n in largest)
        raise ValueError(f"query {given} is not on grid {shown}: pass {len(largest)} indices from 0 up to {last}")
    if len(layout.grid) != len(largest):
        raise ValueError(f"grids {layout.grid} and {largest} have different axes: choose layers of one")
    token = 0
    for i, n, m in zip(at, largest, layout.grid, strict=True):
        token = token * m + (2 * i + 1) * m // (2 * n)
    return layout.prefix + token


def details(
    calls: Sequence[Recorded], query: str | tuple[int, ...] | None, pattern: str | None, sample: int = 0
) -> dict[str, Details]:
    """Rows of one query and histograms of offsets, by module.

    Args:
        calls: One call of each module.
        query: As in `query_token`.
        pattern: Of the sparse rows; None without. Modules on whose grid it is not defined have none.
        sample: Which sample of the batch.

    Raises:
        ValueError: If the query is not there.
    """
    largest = max((call.layout.grid for call in calls), key=lambda grid: (len(grid), grid))
    found = {}
    for call in calls:
        layout, one = call.layout, of_sample(call, sample)
        token = query_token(query, layout, largest)
        inner = slice(layout.prefix, layout.prefix + layout.tokens)
        try:
            both = rows(one, [token], pattern)
        except ValueError:
            both = rows(one, [token])
        dense, sparse = (
            [plane(each, layout.grid) for each in t[0, :, 0, inner].cpu()] if t is not None else [] for t in both
        )
        moved = offsets(one).cpu()
        if layout.dims == 3:
            # Offsets in time are added up.
            moved = moved.sum(1)
        elif layout.dims == 1:
            moved = moved[:, None]
        read = [plane(each, layout.grid) for each in read_by_head(one)[:, inner].cpu()]
        found[call.site] = Details(dense, sparse, read, [each.double().numpy() for each in moved])
    return found


def read_by_head(call: Recorded) -> torch.Tensor:
    """How much the mean query of the grid reads each token, by each head of the first sample [H, S]."""
    layout, heads = call.layout, call.q.shape[2]
    mean = torch.zeros(layout.length, dtype=wide_dtype(call.q), device=call.q.device)
    mean[layout.prefix : layout.prefix + layout.tokens] = 1 / layout.tokens
    # One row a head, which is the others' nothing.
    return received(of_sample(call, 0), torch.eye(heads, device="cpu").to(mean)[None, :, :, None] * mean)[0]


def of_sample(call: Recorded, sample: int) -> Recorded:
    """A call of one sample of its batch."""
    at = range(call.q.shape[0])[sample]
    some = slice(at, at + 1)
    mask = None if call.key_mask is None else call.key_mask[some]
    return call._replace(q=call.q[some], k=call.k[some], v=call.v[some], key_mask=mask)


def rolled_out(calls: Sequence[Recorded], row: int | None, sample: int = 0) -> torch.Tensor:
    """Rollout of one row on the grid [tokens]; None for the row that `rollout` takes.

    Raises:
        ValueError: As `rollout`.
    """
    layout = calls[0].layout
    found = rollout([of_sample(call, sample) for call in calls], None if row is None else [row])
    return found[0, 0, layout.prefix : layout.prefix + layout.tokens].cpu()


@torch.no_grad()
def scored(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, maps: torch.Tensor, grid: tuple[int, int]
) -> list[dict[str, float]]:
    """Average drop and increase in confidence of saliency maps, at the largest 100, 50 and 15 % of their values.

    Args:
        model: Images to scores of classes.
        images: [N, C, height, width].
        maps: [N, tokens] on the grid.
        grid: Rows and columns.

    Returns:
        {"share", "average_drop", "confidence_gain"} for each share.
    """
    plain = model(images).softmax(-1)
    best = plain.argmax(-1, keepdim=True)
    found = []
    for share in SHARES:
        small = top_share(maps.to(images).view(-1, 1, *grid), share)
        large = F.interpolate(small, size=images.shape[-2:], mode="bilinear").clamp(0, 1)
        masked = model(images * large).softmax(-1).gather(-1, best)[:, 0]
        here = plain.gather(-1, best)[:, 0]
        drop, gain = average_drop(here, masked), confidence_gain(here, masked)
        found.append({"share": share, "average_drop": drop, "confidence_gain": gain})
    return found
