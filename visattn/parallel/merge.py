"""Outputs over disjoint sets of keys become the output over all of them."""

from __future__ import annotations

import torch

from visattn.operands import wants_gradient, wide_dtype

Result = tuple[torch.Tensor, torch.Tensor]


def merged(outs: torch.Tensor, lses: torch.Tensor) -> Result:
    """The output over all keys from outputs over parts of them.

    Args:
        outs: Outputs [parts, ..., D] in float32 at least.
        lses: Their natural log-sum-exps [parts, ...], -inf where no key was visible.

    Returns:
        Output [..., D] and log-sum-exp [...]; zeros and -inf where no part has a visible key.
    """
    top = lses.detach().amax(0)
    top = top.masked_fill(top.isinf(), 0)
    weights = (lses - top).exp()
    total = weights.sum(0)
    # Where nothing is visible, all weights are zero already.
    share = weights / total.masked_fill(total == 0, 1)
    return (share[..., None] * outs).sum(0), total.log() + top


def add_rows(result: Result, rows: Result, grid: tuple[int, ...], axis: int, first: int, before: int) -> Result:
    """Merge the output of some rows over other keys into that of a slab.

    Args:
        result: Output [B, S, H, D] and log-sum-exp [B, S, H] of a slab with its dense tokens.
        rows: Those of some rows of its grid.
        grid: The slab's grid.
        axis: The axis whose rows they are.
        first: The first of them.
        before: Dense tokens before the grid.
    """
    out, lse = result
    tokens, dim = 1, 1 + axis
    for side in grid:
        tokens *= side
    number = rows[0].shape[1] * grid[axis] // tokens
    sides = (*grid[:axis], number, *grid[axis + 1 :])
    at = [t.narrow(1, before, tokens).unflatten(1, grid).narrow(dim, first, number) for t in (out, lse)]
    own = [t.unflatten(1, sides) for t in rows]
    if not wants_gradient(*result, *rows):
        # In place, each output read once; where neither side sees a key, both are zero.
        share = torch.sigmoid(own[1] - at[1]).nan_to_num(0)
        at[0].lerp_(own[0], share[..., None].to(out.dtype))
        torch.logaddexp(at[1], own[1], out=at[1])
        return result
    wide = wide_dtype(out)
    both = merged(torch.stack([at[0].to(wide), own[0].to(wide)]), torch.stack([at[1], own[1]]))
    new = []
    for t, value in zip(result, both, strict=True):
        inner = t.narrow(1, before, tokens).unflatten(1, grid)
        inner = torch.slice_scatter(inner, value.to(t.dtype), dim, first, first + number).flatten(1, len(grid))
        new.append(torch.cat([t[:, :before], inner, t[:, before + tokens :]], 1))
    return new[0], new[1]
