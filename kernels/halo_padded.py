"""HaloNet's attention as it was trained: the zero padding around the grid takes part in the softmax."""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def halo_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    block: int,
    halo: int,
    *,
    stride: int = 1,
    scale: float | None = None,
    relative: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Blocked local attention whose windows reach into zero padding that is not masked.

    A key in the padding is zero: its logit is only the position's, and its value is zero. With masked padding
    it is the pattern `Halo`. Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual
    Backbones" (CVPR 2021), section 2.2; the relative logits are those of "Attention Augmented Convolutional
    Networks" (Bello et al. 2019), section 3.2.

    Args:
        q: Queries [B, Hq * Wq, H, D] with Hq, Wq = grid / stride.
        k: Keys [B, Hk * Wk, H, D] of the grid (Hk, Wk).
        v: Values [B, Hk * Wk, H, Dv].
        grid: Rows and columns of the keys, multiples of the block.
        block: Keys per block and axis.
        halo: Keys seen beyond each side of the block.
        stride: Distance of neighbouring queries; divides the block.
        scale: Factor on q k^T, D**-0.5 if None.
        relative: Embeddings of relative rows and columns, [2 * (block + 2 * halo) - 1, D] each: q times the one
            at (key's place in the window) - (query's place in its block) is added to the logits, without scale.

    Returns:
        [B, Hq * Wq, H, Dv].

    Raises:
        ValueError: If the block does not divide the grid, or the stride not the block.
    """
    if any(n % block for n in grid) or block % stride:
        raise ValueError(
            f"grid {grid[0]}x{grid[1]}, block {block}, stride {stride}: HaloNet's padding is defined where the block "
            "divides the grid and the stride the block; pad the input, or use the pattern halo(block, halo)"
        )
    rows, columns, side = grid[0] // block, grid[1] // block, block // stride
    queries = q.unflatten(1, (rows, side, columns, side)).permute(0, 1, 3, 5, 2, 4, 6)
    bias = None if relative is None else _relative_logits(queries, relative)
    keys, values = (_windows(t, grid, block, halo) for t in (k, v))
    out = scaled_dot_product_attention(queries.flatten(4, 5), keys, values, attn_mask=bias, scale=scale)
    return out.unflatten(4, (side, side)).permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 4)


def _windows(x: torch.Tensor, grid: tuple[int, int], block: int, halo: int) -> torch.Tensor:
    """The window of every block: [B, tokens, H, D] -> [B, block rows, block columns, H, window**2, D]."""
    x = pad(x.unflatten(1, grid), (0, 0, 0, 0, halo, halo, halo, halo))
    size = block + 2 * halo
    windows = x.unfold(1, size, block).unfold(2, size, block)
    return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(4, 5)


def _relative_logits(q: torch.Tensor, relative: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Logits of relative rows and columns for queries [..., side, side, D]: [..., side**2, window**2]."""
    side, size = q.shape[-2], (len(relative[0]) + 1) // 2
    place = torch.arange(size, device=q.device) - torch.arange(side, device=q.device)[:, None] + size - 1
    by_row = torch.einsum("...yxd,ywd->...yxw", q, relative[0][place])
    by_column = torch.einsum("...yxd,xwd->...yxw", q, relative[1][place])
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(-2).flatten(-3, -2)
