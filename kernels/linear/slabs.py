"""Linear attention of a sequence that is cut in slabs over ranks: what travels are states, whatever the length.

Source: Sun et al., "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid" (2025), section 3: one
gather of all ranks' states in the forward pass and one sum of their gradients in the backward; with a causal axis a
rank adds up the states of the ranks before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from visattn.kernels.linear.causal import Sides, decay_rates, earlier, running
from visattn.kernels.linear.features import feature_map, peak
from visattn.kernels.linear.plain import divided
from visattn.operands import repeated, widened
from visattn.parallel.dense import Gathered
from visattn.parallel.moved import Moved
from visattn.parallel.slabs import Slabs
from visattn.patterns import Linear


def linear_on_slabs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Linear,
    slabs: Slabs,
    rank: int,
    group: dist.ProcessGroup | None = None,
    key_mask: torch.Tensor | None = None,
    moved: Moved | None = None,
) -> torch.Tensor:
    """The attention of `visattn.patterns.Linear` for a rank's queries; every rank makes this call.

    Args:
        q: Queries [B, S, H, D] of this rank: dense tokens and its slab.
        k: Keys [B, S, Hkv, D] of the same tokens.
        v: Values [B, S, Hkv, D].
        pattern: The pattern, whose feature map has no parameters.
        slabs: How the whole sequence is cut.
        rank: Whose tokens these are.
        group: The process group.
        key_mask: bool [B, S], or None.
        moved: Gets the bytes of the states added.

    Returns:
        [B, S, H, D] in v's dtype.
    """
    local, heads = slabs.local(rank), q.shape[2]
    axis = pattern.causal_axis(local.grid)
    q, keys = feature_map(q, pattern.feature), feature_map(k, pattern.feature)
    if key_mask is not None:
        keys = keys * key_mask[:, :, None, None]
    # Factors per query are free; those of keys must be all ranks'.
    q, own_peak = q / peak(q, (3,)), peak(keys, (1, 3))
    keys, values = repeated(keys / own_peak, heads), repeated(widened(v), heads)
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], 3)
    cut = slabs.axis if axis is None else axis
    queries, sided, channels = (Sides.of(x, local, cut) for x in (q, keys, values))
    rates = decay_rates(pattern, heads, q)
    if axis is None:
        left = torch.einsum("bnrhf,bnrhd->bhfd", sided.grid, channels.grid)[:, None]
    elif axis == slabs.axis:
        left = torch.stack([_left(sided.grid, channels.grid, rates), _left(sided.grid, channels.grid, 0 * rates)], 1)
    else:
        # Positions lie across ranks: a state for each.
        left = torch.einsum("bnrhf,bnrhd->bnhfd", sided.grid, channels.grid)
    states, factor = _gathered(left, repeated(own_peak, heads)[:, 0, :, 0], group, moved)
    factor = factor[:, None, :, None]
    # Keys of this rank in the scale of all.
    dense = torch.stack([torch.einsum("bshf,bshd->bhfd", sided[i] * factor, channels[i]) for i in (0, 2)]).sum(0)
    grid = queries.grid
    if axis is None:
        everything = states.sum(0)[:, 0] + dense
        out = torch.einsum("bnrhf,bhfd->bnrhd", grid, everything)
    elif axis == slabs.axis:
        everything = states[:, :, 1].sum(0) + dense
        before = _before(states[:, :, 0], slabs, rank, rates)
        out = earlier(grid, sided.grid * factor[:, None], channels.grid, rates, before)
        out = out + torch.einsum("bnrhf,bhfd->bnrhd", grid, dense)
    else:
        whole = states.sum(0)
        everything = whole.sum(1) + dense
        sums = running(whole, (-rates).exp())[:, 1:] + dense[:, None]
        out = torch.einsum("bnrhf,bnhfd->bnrhd", grid, sums)
    ends = [torch.einsum("bshf,bhfd->bshd", queries[i], everything) for i in (0, 2)]
    out = Sides(ends[0], out, ends[1]).joined(local, cut)
    return divided(out[..., :-1], out[..., -1]).to(v.dtype)


def _left(k: torch.Tensor, v: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """What the positions of a slab leave, decayed to its last: [B, n, R, H, F], [B, n, R, H, D] -> [B, H, F, D]."""
    steps = torch.arange(k.shape[1] - 1, -1, -1, device=k.device, dtype=k.dtype)
    return torch.einsum("bnrhf,nh,bnrhd->bhfd", k, (-steps[:, None] * rates).exp(), v)


def _before(states: torch.Tensor, slabs: Slabs, rank: int, rates: torch.Tensor) -> torch.Tensor:
    """What the ranks before one leave, decayed to just before its slab: [ranks, B, H, F, D] -> [B, H, F, D]."""
    total = torch.zeros_like(states[0])
    for other in range(rank):
        steps = slabs.start(rank) - slabs.start(other) - slabs.sizes[other]
        total = total + (-steps * rates).exp()[:, None, None] * states[other]
    return total


def _gathered(
    states: torch.Tensor, own_peak: torch.Tensor, group: dist.ProcessGroup | None, moved: Moved | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of all ranks in one scale, by one gather.

    Args:
        states: This rank's [B, states, H, F, D], of keys divided by their peak.
        own_peak: That peak [B, H].
        group: The process group.
        moved: Gets the bytes added.

    Returns:
        [ranks, B, states, H, F, D], and the factor of this rank's keys [B, H].
    """
    sides = states.shape[3:]
    packed = torch.cat([states.flatten(3), own_peak[:, None, :, None].expand(-1, states.shape[1], -1, 1)], 3)
    parts: Any = Gathered.apply(packed, group)
    if moved is not None:
        size = packed.numel() * packed.element_size() * (len(parts) - 1)
        moved.add(sent=size, received=size)
    peaks = parts[..., -1:].detach()
    factors = peaks / peaks.amax(0)
    own = factors[dist.get_rank(group), :, 0, :, 0]
    return (parts[..., :-1] * factors).unflatten(4, sides), own
