"""Agent attention for Stable Diffusion without training: merged tokens, agents from a coarser merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from visattn.kernels.fused import fused


@dataclass(frozen=True, eq=False)
class Matching:
    """Which tokens merge into which: one destination per cell of the grid, all others may merge into one.

    Attributes:
        destinations: Token index of each destination: [M].
        sources: Token index of the others, those most like a destination first: [B, tokens - M].
        targets: Which destination each source would merge into: [B, tokens - M].
    """

    destinations: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor

    def merge(self, x: torch.Tensor, merged: int) -> torch.Tensor:
        """Average the first `merged` sources into their targets: [B, N, C] -> [B, N - merged, C], sources first.

        At most all sources merge.
        """
        destination = x[:, self.destinations]
        source = x.gather(1, self.sources[..., None].expand(-1, -1, x.shape[2]))
        index = self.targets[:, :merged, None].expand(-1, -1, x.shape[2])
        destination = destination.scatter_reduce(1, index, source[:, :merged], "mean", include_self=True)
        return torch.cat([source[:, merged:], destination], 1)

    def unmerge(self, x: torch.Tensor, merged: int) -> torch.Tensor:
        """Put merged tokens back where they came from: [B, N - merged, C] -> [B, N, C]."""
        kept = self.sources.shape[1] - min(merged, self.sources.shape[1])
        destination = x[:, kept:]
        back = destination.gather(1, self.targets[:, :merged, None].expand(-1, -1, x.shape[2]))
        sources = torch.cat([back, x[:, :kept]], 1)
        out = x.new_empty(x.shape[0], self.sources.shape[1] + len(self.destinations), x.shape[2])
        out[:, self.destinations] = destination
        return out.scatter(1, self.sources[..., None].expand(-1, -1, x.shape[2]), sources)


def match(
    features: torch.Tensor, grid: tuple[int, int], cell: tuple[int, int], generator: torch.Generator | None = None
) -> Matching:
    """Choose one destination per cell and rank the other tokens by cosine similarity to their best one.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), section 4.

    Args:
        features: What is compared, [B, N, C].
        grid: Rows and columns, N = rows * columns.
        cell: Rows and columns of a cell; what no whole cell covers has no destination.
        generator: Chooses the destinations at random; None takes the top left token of each cell (as the
            original does for odd batches).
    """
    rows, columns = (n // c for n, c in zip(grid, cell, strict=True))
    place = torch.zeros(rows, columns, dtype=torch.int64, device="cpu")
    if generator is not None:
        place = torch.randint(cell[0] * cell[1], (rows, columns), generator=generator, device="cpu")
    y = torch.arange(rows, device="cpu")[:, None] * cell[0] + place // cell[1]
    x = torch.arange(columns, device="cpu") * cell[1] + place % cell[1]
    destinations = (y * grid[1] + x).flatten()
    rest = torch.ones(grid[0] * grid[1], dtype=torch.bool, device="cpu")
    rest[destinations] = False
    sources = rest.nonzero()[:, 0].to(features.device)
    destinations = destinations.to(features.device)
    unit = normalize(features, dim=-1)
    best, target = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(-1)
    order = best.argsort(-1, descending=True)
    return Matching(destinations, sources[order], target.gather(1, order))


def agents_pay(tokens: int, merged: int, agent_merged: int) -> bool:
    """Whether agents are used: they must be less than half as many as the merged tokens (AgentSD's condition)."""
    return 2 * (tokens - agent_merged) < tokens - merged


def agent_sd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    *,
    read_scale: float = 0.3,
    shortcut: float = 0.075,
) -> torch.Tensor:
    """Agent attention with a flatter second softmax and a shortcut of the values.

    out = softmax(q A^T * D**(-read_scale / 2)) [softmax(A k^T * D**-0.5) v] + shortcut * v. Source: Han et al.,
    "Agent Attention" (ECCV 2024), section 4.4, and its released settings (k_scale2 and k_shortcut there).

    Args:
        q: Queries of the merged tokens [B, N, H, D].
        k: Their keys [B, N, H, D].
        v: Their values [B, N, H, D].
        agents: Queries of the agents, projected from the features merged further: [B, n, H, D].
        read_scale: Exponent of the second scale, relative to that of plain attention.
        shortcut: Factor on the values that are added.

    Returns:
        [B, N, H, D].
    """
    q, k, v, agents = (t.transpose(1, 2) for t in (q, k, v, agents))
    gathered = fused(agents, k, v)
    out = fused(q, agents, gathered, scale=q.shape[-1] ** (-0.5 * read_scale))
    return (out + shortcut * v).transpose(1, 2)
