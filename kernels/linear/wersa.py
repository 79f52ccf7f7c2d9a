"""Features of WERSA: queries and keys whose Haar bands over the grid are weighed, through random maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import gelu

from visattn.kernels.linear.features import peak
from visattn.layout import Layout
from visattn.operands import repeated, widened
from visattn.patterns import Wersa
from visattn.patterns.pooling import pool, tokens_of_cells


def wersa_features(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Wersa,
    layout: Layout,
    parameters: Mapping[str, torch.Tensor],
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries and keys, float32 at least and not negative, zero for hidden keys.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        pattern: The pattern.
        layout: The tokens.
        parameters: Those of `Wersa.parameter_shapes`; missing ones have their initial values.
        key_mask: bool [B, S], or None.

    Returns:
        Features [B, S, H, F] of both.
    """
    heads = q.shape[2]
    q, k = widened(q), repeated(widened(k), heads)
    initial = pattern.initial_parameters(heads, q.shape[3], layout.grid)
    own = {name: parameters.get(name, value).to(q) for name, value in initial.items()}
    shares = gates(q, layout, own, key_mask)
    found = [
        torch.einsum("bshd,hdf->bshf", weighed_bands(gelu(x), shares, layout, key_mask), own[name]).relu()
        for x, name in ((q, "query_map"), (k, "key_map"))
    ]
    if key_mask is not None:
        found[1] = found[1] * key_mask[:, :, None, None]
    # Factors per query and per head cancel.
    return found[0] / peak(found[0], (3,)), found[1] / peak(found[1], (1, 3))


def gates(
    q: torch.Tensor, layout: Layout, parameters: Mapping[str, torch.Tensor], key_mask: torch.Tensor | None
) -> torch.Tensor:
    """What each band of each head is multiplied by, from the mean query of the grid: [B, H, levels + 1]."""
    inside = slice(layout.prefix, layout.prefix + layout.tokens)
    grid = q[:, inside]
    if key_mask is None:
        mean = grid.mean(1)
    else:
        there = key_mask[:, inside, None, None]
        mean = grid.masked_fill(~there, 0).sum(1) / there.sum(1).clamp(min=1)
    hidden = torch.einsum("bhd,hdg->bhg", mean, parameters["hidden_weight"]) + parameters["hidden_bias"]
    logits = torch.einsum("bhg,hgl->bhl", hidden.relu(), parameters["gate_weight"]) + parameters["gate_bias"]
    return logits.sigmoid() * parameters["scale"]


def weighed_bands(x: torch.Tensor, shares: torch.Tensor, layout: Layout, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, S, H, D] with each Haar band over the grid times its share [B, H, levels + 1]."""
    inside = slice(layout.prefix, layout.prefix + layout.tokens)
    keep = None if key_mask is None else key_mask[:, inside]
    finer = x[:, inside]
    shares = shares[:, None, :, :, None]
    out = torch.zeros_like(finer)
    for level in range(1, shares.shape[3]):
        coarser = box_means(x[:, inside], layout.grid, 2**level, keep)
        out = out + (finer - coarser) * shares[:, :, :, level - 1]
        finer = coarser
    last = shares[:, :, :, -1]
    before, behind = x[:, : inside.start] * last, x[:, inside.stop :] * last
    return torch.cat([before, out + finer * last, behind], 1)


def box_means(x: torch.Tensor, grid: tuple[int, ...], side: int, keep: torch.Tensor | None) -> torch.Tensor:
    """The mean of each token's box, of tokens that are kept: [B, tokens, H, D] alike, zeros where none is."""
    cell = tuple(min(side, n) for n in grid)
    means = pool(x, grid, cell, None, keep, tokens_of_cells(grid, cell, keep, x.device))
    means = means.unflatten(1, tuple(-(-n // c) for n, c in zip(grid, cell, strict=True)))
    for axis, (n, c) in enumerate(zip(grid, cell, strict=True), 1):
        means = means.repeat_interleave(c, axis).narrow(axis, 0, n)
    return means.flatten(1, len(grid))
