"""Scores by a search down a tree of means (after HiP): only blocks below good nodes are looked at."""

from __future__ import annotations

import torch

from visattn.patterns.choice.picks import best
from visattn.patterns.routes import lists_of

# Numbers of nodes that are picked out at a time, and how many times longer it takes to pick a node out and multiply it
# than to multiply it among all.
GATHERED, DENSE = 2**24, 64


def levels(
    keys: torch.Tensor, number: torch.Tensor, branch: int, leaves: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean keys and valid tokens of the nodes of each level, the leaves last.

    Args:
        keys: Mean keys of the blocks [B, Hkv, D, columns].
        number: Their valid tokens [1 or B, columns].
        branch: Children of a node: neighbours in the order of the blocks.
        leaves: Leaves that are looked for; the top level is the first with at most twice as many nodes.

    Returns:
        [B, Hkv, D, nodes] and [1 or B, nodes] of each level.
    """
    found = [(keys, number)]
    while found[0][1].shape[-1] > max(2 * leaves, branch):
        mean, count = found[0]
        behind = -count.shape[-1] % branch
        summed, total = (
            torch.nn.functional.pad(t, (0, behind)).unflatten(-1, (-1, branch)).sum(-1)
            for t in (mean * count[:, None, None], count)
        )
        found.insert(0, (summed / total.clamp(min=1)[:, None, None], total))
    return found


def scores(
    query: torch.Tensor, tree: list[tuple[torch.Tensor, torch.Tensor]], head: torch.Tensor, branch: int, leaves: int
) -> torch.Tensor:
    """Products of mean queries and mean keys of the leaves that a search finds, -inf for the others.

    Of each level the `2 * leaves` nodes with the largest products are kept, and their children looked at next.

    Args:
        query: Mean queries times the factor on the logits [B, h, rows, D].
        tree: What `levels` gave.
        head: Key head of each query head [h].
        branch: Children of a node.
        leaves: Leaves that are looked for.

    Returns:
        [B, h, rows, columns].
    """
    batch, heads, rows, dim = query.shape
    columns = tree[-1][1].shape[-1]
    found = query.new_full((batch, heads, rows, columns), float("-inf"))
    widest = min(columns, 2 * leaves * branch)
    step = max(1, GATHERED // max(1, batch * heads * widest * dim))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        place, value = _search(query[:, :, some], tree, head, branch, leaves)
        # What lies behind the last leaf goes to the last, which is a child of the same node and keeps its own.
        found[:, :, some].scatter_reduce_(3, place.clamp(max=columns - 1), value, "amax")
    return found


def _search(
    query: torch.Tensor, tree: list[tuple[torch.Tensor, torch.Tensor]], head: torch.Tensor, branch: int, leaves: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The leaves that a search meets and their products, -inf for those that are none: [B, h, rows, n] each."""
    mean, count = tree[0]
    value = (query @ mean[:, head]).masked_fill((count == 0)[:, None, None], float("-inf"))
    place = torch.arange(value.shape[-1], device=query.device).expand(value.shape)
    for mean, count in tree[1:]:
        number = min(2 * leaves, value.shape[-1])
        kept = place.gather(3, lists_of(best(value, number), number).tiles)
        # Children of what was kept, in the order of the nodes.
        place = (kept[..., None] * branch + torch.arange(branch, device=query.device)).flatten(3)
        value = _products(query, mean, place.clamp(max=count.shape[-1] - 1), head)
        there = torch.nn.functional.pad(count > 0, (0, branch))
        value = value.masked_fill(~_at(there, place), float("-inf"))
    return place, value


def _products(query: torch.Tensor, mean: torch.Tensor, place: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Products with the nodes of each row [B, h, rows, n]."""
    if place.shape[3] * DENSE > mean.shape[-1]:
        # All of a level at once is faster than picking out so many.
        return (query @ mean[:, head]).gather(3, place)
    nodes = mean[:, head].transpose(2, 3)
    sample, which = (torch.arange(n, device=query.device) for n in nodes.shape[:2])
    own = nodes[sample[:, None, None, None], which[:, None, None], place]
    return (own @ query[..., None])[..., 0]


def _at(there: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """What there is [1 or B, nodes] at places [B, h, rows, n]."""
    return there.expand(len(place), -1)[:, None, None].expand(*place.shape[:3], -1).gather(3, place)
