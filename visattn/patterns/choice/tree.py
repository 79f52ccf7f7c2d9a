"""Scores by a search down a tree of means (after HiP): only blocks below good nodes are looked at."""

from __future__ import annotations

import torch

from visattn.patterns.choice.picks import best


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
    kept: torch.Tensor | None = None
    found = query.new_empty(0)
    for depth, (mean, count) in enumerate(tree):
        found = (query @ mean[:, head]).masked_fill((count == 0)[:, None, None], float("-inf"))
        if kept is not None:
            # Children of what was kept, in the order of the nodes.
            below = kept.repeat_interleave(branch, -1)[..., : found.shape[-1]]
            found = found.masked_fill(~below, float("-inf"))
        if depth + 1 < len(tree):
            kept = best(found, min(2 * leaves, found.shape[-1]))
    return found
