"""k-means of the tokens of each head: no random start, so that the same tokens make the same clusters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.patterns.choice.stratified import stratified

# Distances that exist at a time, in numbers.
DISTANCES = 2**26


class Clusters(NamedTuple):
    """Clusters of tokens.

    Attributes:
        ids: Cluster of each token: int64 [B, H, tokens], of the centres before the last update.
        centres: Means of the tokens of each cluster: [B, H, clusters, D].
        sizes: Valid tokens of each cluster: [B, H, clusters].
    """

    ids: torch.Tensor
    centres: torch.Tensor
    sizes: torch.Tensor


def first_centres(x: torch.Tensor, number: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens of x [B, H, tokens, D] that are spread over all of them, as centres: [B, H, number, D].

    With `valid`, bool [B, tokens], of the valid tokens of each sample; where there are fewer than centres, the others
    are the last one's, and `k_means` leaves them empty.
    """
    if valid is None:
        return x[:, :, stratified(number, torch.full((1,), x.shape[2], device=x.device))]
    index = stratified(number, valid.sum(1, keepdim=True))
    # Valid tokens first, in their order.
    token = (~valid).to(torch.uint8).sort(dim=1, stable=True).indices.gather(1, index)
    return x.gather(2, token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def k_means(x: torch.Tensor, centres: torch.Tensor, iterations: int, valid: torch.Tensor | None) -> Clusters:
    """So many times: each token to its nearest centre, each centre to the mean of its tokens.

    Of equal distances the lower index wins. A cluster without valid tokens keeps its centre, and clusters behind the
    number of valid tokens have none.

    Args:
        x: Tokens [B, H, tokens, D].
        centres: Where to start [B, H, clusters, D].
        iterations: At least 1.
        valid: Tokens that count for the means, bool [B, tokens], or None for all; the others have a cluster too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, centres = x.to(wide), centres.to(wide)
    weight = torch.ones(x.shape[:3], dtype=wide, device=x.device)
    if valid is not None:
        weight = weight * valid[:, None].to(wide)
    ids, sizes, left = torch.empty(0), torch.empty(0), None
    if valid is not None:
        # Equal centres, which rounding would tell apart.
        left = torch.arange(centres.shape[2], device=x.device) >= valid.sum(1, keepdim=True)
    for _ in range(iterations):
        ids = _nearest(x, centres, left)
        sizes = torch.zeros(centres.shape[:3], dtype=wide, device=x.device).scatter_add(2, ids, weight)
        index = ids[..., None].expand_as(x)
        summed = torch.zeros_like(centres).scatter_add(2, index, x * weight[..., None])
        centres = torch.where(sizes[..., None] > 0, summed / sizes.clamp(min=1)[..., None], centres)
    return Clusters(ids, centres, sizes)


def _nearest(x: torch.Tensor, centres: torch.Tensor, left: torch.Tensor | None) -> torch.Tensor:
    """Index of the nearest centre of each token, but for those left out, bool [B, clusters]: [B, H, tokens]."""
    square = centres.square().sum(-1)
    square = square if left is None else square.masked_fill(left[:, None], float("inf"))
    step = max(1, DISTANCES // max(1, square.numel()))
    parts = []
    for first in range(0, x.shape[2], step):
        # Without the square of the token itself, which is the same for all centres.
        distance = square[:, :, None] - 2 * x[:, :, first : first + step] @ centres.transpose(2, 3)
        least = distance.amin(-1, keepdim=True)
        # torch.argmin promises no order of equal values: the first mark is the lower index.
        parts.append((distance == least).to(torch.uint8).argmax(-1))
    return torch.cat(parts, 2)
