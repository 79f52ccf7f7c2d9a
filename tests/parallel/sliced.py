"""What every rank runs in the tests of `visattn.parallel`."""

import torch
import torch.distributed as dist

from visattn import parallel

RUNS = {"halo": parallel.halo_attention, "ulysses": parallel.ulysses_attention}


def tensors(layout, heads, kv_heads, batch=2, dim=8, seed=0):
    """q, k, v of the whole sequence and a gradient of the output, float64."""
    made = torch.Generator().manual_seed(seed)
    shapes = [(batch, layout.length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def sliced(rank, how, pattern, layout, axis, sizes, heads, kv_heads, masked):
    """A rank's output, gradients and bytes, backward from its own slab and, of dense tokens, an equal share."""
    slabs = parallel.Slabs(layout, axis, sizes)
    whole = tensors(layout, heads, kv_heads)
    q, k, v, grad = (slabs.shard(t, rank).clone() for t in whole)
    for t in (q, k, v):
        t.requires_grad_()
    mask = None
    if masked:
        mask = slabs.shard(key_mask(layout), rank)
    moved = parallel.Moved()
    out = RUNS[how](q, k, v, pattern, slabs, key_mask=mask, moved=moved)
    local = slabs.local(rank)
    share = torch.full((local.length, 1, 1), 1 / len(sizes), dtype=torch.float64)
    share[local.prefix : local.prefix + local.tokens] = 1
    out.backward(grad * share)
    return [t.detach() for t in (out, q.grad, k.grad, v.grad)], (moved.sent, moved.received, moved.shared)


def graphed(rank, how, pattern, layout):
    """The error of a gradient whose graph is asked for."""
    slabs = parallel.Slabs.even(layout, dist.get_world_size(), 0)
    q, k, v, _ = (slabs.shard(t, rank).requires_grad_() for t in tensors(layout, 4, 4))
    out = RUNS[how](q, k, v, pattern, slabs)
    try:
        torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    except ValueError as error:
        return str(error)
    return ""


def every(rank, how, patterns, *rest):
    """`sliced` for several patterns, or the error that each is refused with."""
    found = []
    for pattern in patterns:
        try:
            found.append(sliced(rank, how, pattern, *rest))
        except ValueError as error:
            found.append(str(error))
    return found


def key_mask(layout, batch=2):
    """A mask that hides text of one sample and grid tokens of the other."""
    made = torch.ones(batch, layout.length, dtype=torch.bool)
    made[0, : layout.prefix // 2] = False
    made[1, layout.prefix :: 3] = False
    return made


def refused(rank, how, pattern, layout, axis):
    """The error of a call that every rank refuses."""
    slabs = parallel.Slabs.even(layout, dist.get_world_size(), axis)
    q, k, v, _ = (slabs.shard(t, rank) for t in tensors(layout, 4, 4))
    try:
        RUNS[how](q, k, v, pattern, slabs)
    except ValueError as error:
        return str(error)
    return ""
