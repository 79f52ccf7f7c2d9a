"""Which blocks are listed by their scores. Ties go to the lower index, and everything stays on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634
# Standard deviation of the scores of a row that estimates assume; what is reached stands in the report.
SPREAD = 2.0


@dataclass(frozen=True, eq=False)
class Seen:
    """Which blocks take part.

    Attributes:
        rows: Query blocks with valid tokens: bool [B, rows], None where all are.
        columns: Key blocks with valid tokens: bool [B, columns], None where all are.
        reach: Key blocks that a query block may see: bool [rows, columns], None where it may see all.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    reach: torch.Tensor | None = None


def ranked(x: torch.Tensor) -> torch.Tensor:
    """Indices along the last axis from the largest value to the smallest, of equal ones the lower first."""
    # torch.topk promises no order of ties.
    return x.sort(dim=-1, descending=True, stable=True).indices


def best(x: torch.Tensor, number: int) -> torch.Tensor:
    """Marks at the `number` largest values of the last axis, of equal ones the lower indices first."""
    # The value of the last one is the same however torch.topk orders ties.
    bar = x.topk(number, dim=-1).values[..., -1:]
    above, level = x > bar, x == bar
    room = number - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


def _marked(index: torch.Tensor, keep: torch.Tensor, length: int) -> torch.Tensor:
    """Marks at those indices [..., n] that are kept (bool, broadcasts): bool [..., length]."""
    mask = torch.zeros(*index.shape[:-1], length, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, index, keep.expand_as(index))


def _hidden(scores: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Scores in which key blocks that take no part come last."""
    return scores if seen.columns is None else scores.masked_fill(~seen.columns[:, None, None], float("-inf"))


def _ranking(scores: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Scores that rank everybody: of nothing but -inf, what takes part comes before padding and what nobody may see.

    A score of -inf says that nothing was estimated, as where two blocks have no valid pair on their antidiagonal, or a
    search passed a block by; it must not lose its place to a block that cannot be seen at all.
    """
    if seen.columns is None and seen.reach is None:
        return scores
    least = torch.finfo(scores.dtype).min
    found = scores.clamp(min=least / 2)
    for part in (seen.reach, None if seen.columns is None else seen.columns[:, None, None]):
        found = found if part is None else found.masked_fill(~part, least)
    return found


def probabilities(scores: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Softmax of each row over the key blocks that take part; zeros for a query block without part or any score."""
    found = _hidden(scores, seen).softmax(-1).nan_to_num(0.0)
    return found if seen.rows is None else found.masked_fill(~seen.rows[:, None, :, None], 0)


def pick_number(scores: torch.Tensor, seen: Seen, forced: torch.Tensor | None, number: int) -> torch.Tensor:
    """The `number` best of each row, what is forced first: bool like the scores."""
    found = _ranking(scores, seen)
    return best(found if forced is None else found.masked_fill(forced, float("inf")), number)


def pick_number_of_all(scores: torch.Tensor, seen: Seen, forced: torch.Tensor | None, number: int) -> torch.Tensor:
    """The `number` pairs of a head with the largest probabilities, what is forced first: bool like the scores."""
    value = probabilities(scores, seen)
    if seen.reach is not None:
        value = value.masked_fill(~seen.reach, -1)
    if seen.columns is not None:
        value = value.masked_fill(~seen.columns[:, None, None], -1)
    if seen.rows is not None:
        value = value.masked_fill(~seen.rows[:, None, :, None], -1)
    value = value if forced is None else value.masked_fill(forced, float("inf"))
    return best(value.flatten(2), number).view(scores.shape)


def bar_of(share: float) -> float:
    """What sums of probabilities may reach for a share: all never carry more than all, whatever they round to."""
    return share if share < 1 else math.inf


def pick_mass(
    scores: torch.Tensor,
    seen: Seen,
    mass: float,
    cover: bool,
    least: int,
    of_all: bool = False,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best of each row (or of all pairs of a head) that carry a share of the probability.

    Args:
        scores: [B, h, rows, columns].
        seen: What takes part.
        mass: The share.
        cover: Whether the block that crosses the share is listed.
        least: Blocks that are listed anyway.
        of_all: Whether a head's rows share the budget.
        first: What carries its part of the share before all others: bool [rows, columns]; None for nothing.

    Returns:
        bool like the scores.
    """
    value = probabilities(scores, seen)
    wanted = value if of_all else _ranking(scores, seen)
    wanted = wanted if first is None else wanted.masked_fill(first, float("inf"))
    if of_all:
        rows = scores.shape[2] if seen.rows is None else seen.rows.sum(-1)[:, None, None]
        order, bar = ranked(wanted.flatten(2)), bar_of(mass) * rows
    else:
        order, bar = ranked(wanted), bar_of(mass)
    carried = value.flatten(2) if of_all else value
    summed = carried.gather(-1, order).cumsum(-1)
    # With `cover`, one is listed while those before it carry no more than the share.
    keep = summed <= bar
    if cover:
        keep = torch.nn.functional.pad(keep[..., :-1], (1, 0), value=True)
    keep = keep & (carried.gather(-1, order) > 0) if of_all else keep
    marked = _marked(order, keep, carried.shape[-1]).view(scores.shape)
    return marked | pick_number(scores, seen, None, least) if least else marked


def pick_height(
    scores: torch.Tensor, seen: Seen, forced: torch.Tensor | None, share: float, cover: bool, of_all: bool
) -> torch.Tensor:
    """What is forced and the best others until they have a share of all heights above the lowest score (VMoBA).

    Heights are those of the scores of a row, or of all pairs of a head, over the lowest of them.

    Args:
        scores: [B, h, rows, columns].
        seen: What takes part.
        forced: What is listed whatever its score, and counts first: bool [rows, columns].
        share: The share.
        cover: Whether the block that crosses the share is listed.
        of_all: Whether a head's rows share the budget.

    Returns:
        bool like the scores; with at least one block that is not forced, if any takes part.
    """
    shape, part = scores.shape, scores.isfinite()
    if seen.columns is not None:
        part = part & seen.columns[:, None, None]
    if seen.rows is not None:
        part = part & seen.rows[:, None, :, None]
    own = torch.zeros_like(part) if forced is None else forced.expand(scores.shape)
    if of_all:
        scores, part, own = (t.flatten(2) for t in (scores, part, own))
    low = scores.masked_fill(~part, float("inf")).amin(-1, keepdim=True)
    height = (scores - low).masked_fill(~part, 0)
    bar = share * height.sum(-1, keepdim=True) - height.masked_fill(~own, 0).sum(-1, keepdim=True)
    other = height.masked_fill(own | ~part, -1)
    order = ranked(other)
    ordered = other.gather(-1, order).clamp(min=0)
    summed = ordered.cumsum(-1)
    keep = (summed - ordered < bar) if cover else summed <= bar
    if share == 1:
        # Everybody with a height is a part of all of them, whatever sums round to.
        keep = ordered > 0 if cover else torch.ones_like(keep)
    keep[..., 0] = True
    marked = _marked(order, keep, scores.shape[-1]) & part & ~own
    return (marked | own).view(shape)


def pick_above(
    scores: torch.Tensor, seen: Seen, tau: float, of_all: bool = False, variance: torch.Tensor | None = None
) -> torch.Tensor:
    """What lies more than `tau` standard deviations above the mean of its row, or of all pairs of a head.

    The standard deviation is that of scores in base 2, with 1e-6 added to their variance; `variance` is one to take
    instead of that of the scores [B, h, rows, 1], in base e.
    """
    x = scores * LOG2E
    axes = (-2, -1) if of_all else (-1,)
    part = torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape[0], 1, *x.shape[2:])
    if seen.columns is not None:
        part = part & seen.columns[:, None, None]
    if seen.rows is not None and of_all:
        part = part & seen.rows[:, None, :, None]
    # What a search passed by has no score that could count.
    part = part & x.isfinite()
    count = part.sum(axes, keepdim=True).clamp(min=1)
    mean = x.masked_fill(~part, 0).sum(axes, keepdim=True) / count
    if variance is None:
        variance = (x - mean).square().masked_fill(~part, 0).sum(axes, keepdim=True) / count
    else:
        variance = variance * LOG2E**2
    return (x > mean + tau * (variance + 1e-6).sqrt()) & part


def at_most(
    mask: torch.Tensor, scores: torch.Tensor, seen: Seen, forced: torch.Tensor | None, most: int
) -> torch.Tensor:
    """Rows of a mask with more than `most` marks without their marks of the lowest scores; what is forced stays."""
    if most >= mask.shape[-1]:
        return mask
    # What is not marked comes behind all that is, even behind padding.
    value = _ranking(scores, seen).clamp(min=torch.finfo(scores.dtype).min)
    value = value if forced is None else value.masked_fill(forced, float("inf"))
    return mask & best(value.masked_fill(~mask, float("-inf")), most)


def number_of(value: int | float, tiles: int) -> int:
    """A count, or a fraction of the tiles rounded up, at least 1 (0 stays 0), at most all."""
    if value == 0:
        return 0
    # A fraction like 0.3 of 10 tiles is 3, whatever its binary form rounds to.
    wanted = value if isinstance(value, int) else math.ceil(round(value * tiles, 9))
    return min(tiles, max(1, wanted))
