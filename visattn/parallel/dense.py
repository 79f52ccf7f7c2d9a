"""Dense queries, which every rank has: each rank's result over its own keys, merged over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from visattn.layout import Layout
from visattn.operands import wants_gradient, wide_dtype
from visattn.parallel.merge import merged
from visattn.parallel.once import once
from visattn.parallel.slabs import Slabs


class Gathered(torch.autograd.Function):
    """A tensor of every rank: [ranks, ...]. A rank's gradient is the sum of what all ranks have for its tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Gather."""
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum."""
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def share_dense(
    out: torch.Tensor, lse: torch.Tensor, local: Layout, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, int]:
    """Merge the dense queries' results of all ranks.

    Args:
        out: Output [B, S, H, D] of this rank's tokens; its dense queries have seen this rank's keys alone.
        lse: Log-sum-exp [B, S, H].
        local: Where the tokens sit.
        group: The process group.

    Returns:
        The output, and the bytes that this rank sent for it.
    """
    stop = local.prefix + local.tokens
    wide = wide_dtype(out)
    ends = [torch.cat([t[:, : local.prefix], t[:, stop:]], 1).to(wide) for t in (out, lse)]
    own = torch.cat([ends[0], ends[1][..., None]], -1)
    parts: Any = Gathered.apply(own, group)
    whole = merged(parts[..., :-1], parts[..., -1])[0].to(out.dtype)
    before, after = whole.split([local.prefix, local.suffix], 1)
    sent = own.numel() * own.element_size() * (dist.get_world_size(group) - 1)
    if wants_gradient(out):
        return torch.cat([before, out[:, local.prefix : stop], after], 1), sent
    out[:, : local.prefix], out[:, stop:] = before, after
    return out, sent


def gathered_slabs(x: torch.Tensor, slabs: Slabs, group: dist.ProcessGroup | None, dim: int = 1) -> torch.Tensor:
    """The whole sequence of all ranks' tokens, on every rank; dense tokens are the first rank's.

    Args:
        x: This rank's tokens, on axis `dim`.
        slabs: How the sequence is cut.
        group: The process group.
        dim: The axis of the tokens.
    """
    lengths = [slabs.local(r).length for r in range(slabs.ranks)]
    # Ranks exchange equal shapes.
    short = max(lengths) - x.shape[dim]
    filled = torch.cat([x, x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :])], dim) if short else x
    parts: Any = Gathered.apply(filled, group)
    return slabs.joined([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)
