"""What every rank runs in the tests of tensors that are not all alike."""

import torch
import torch.distributed as dist

import visattn
from tests.parallel import models
from visattn import Layout, attention, parallel

RUNS = {"halo": parallel.halo_attention, "ulysses": parallel.ulysses_attention}


def tensors(layout, value_dim):
    """q, k, v of the whole sequence, and a gradient of the output."""
    made = torch.Generator().manual_seed(0)
    shapes = [(2, layout.length, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, value_dim), (4, value_dim))]
    return [torch.randn(shape, generator=made) for shape in shapes]


def ran(rank, how, pattern, layout, value_dim=8, learns="qkv", mixed=False):
    """Output and gradients of a rank, or without one of one process; values may be in bfloat16, under autocast."""
    one = rank is None
    slabs = parallel.Slabs.even(layout, 1 if one else dist.get_world_size(), 0)
    whole = tensors(layout, value_dim)
    q, k, v, grad = whole if one else (slabs.shard(t, rank).clone() for t in whole)
    v = v.bfloat16() if mixed else v
    for name, t in zip("qkv", (q, k, v), strict=True):
        t.requires_grad_(name in learns)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = attention(q, k, v, pattern, layout) if one else RUNS[how](q, k, v, pattern, slabs)
    out.backward(grad.to(out.dtype))
    return [None if t is None else t.detach() for t in (out, q.grad, k.grad, v.grad)]


def sharded(rank, name, how, first):
    """Output and gradients of a model whose weights FSDP2 shares over the same processes as its tokens."""
    from torch.distributed.fsdp import fully_shard

    build, pattern, options = models.MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    handle = None if first else visattn.apply(model, pattern, parallel=how, **options)
    for block in model.transformer_blocks:
        fully_shard(block)
    fully_shard(model)
    handle = handle or visattn.apply(model, pattern, parallel=how, **options)
    out = model(**inputs, return_dict=False)[0]
    out.square().mean().backward()
    handle.remove()
    return {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None} | {
        "out": out.detach()
    }


def under_func(rank, how):
    """The error of a gradient by torch.func."""
    layout = Layout((4, 3))
    slabs = parallel.Slabs.even(layout, dist.get_world_size(), 0)
    q, k, v, _ = (slabs.shard(t, rank) for t in tensors(layout, 8))
    try:
        torch.func.grad(lambda q: RUNS[how](q, k, v, "na(window=3x3)", slabs).sum())(q)
    except ValueError as error:
        return str(error)
    return ""


def unlike(rank, how, odd, layout):
    """The error of a call that the last rank makes in another way, and the output of the next one."""
    slabs = parallel.Slabs.even(layout, dist.get_world_size(), 0)
    q, k, v, _ = (slabs.shard(t, rank) for t in tensors(layout, 8))
    given, pattern, mask = (q, k, v), "na(window=3x3)", None
    if rank == slabs.ranks - 1:
        pattern = "na(window=3x5)" if odd == "pattern" else pattern
        given = [t[:1] if odd == "batch" else t.double() if odd == "dtype" else t for t in given]
        mask = torch.ones(q.shape[:2], dtype=torch.bool) if odd == "mask" else None
        given[0].requires_grad_(odd == "gradient")
    try:
        RUNS[how](*given, pattern, slabs, key_mask=mask)
    except ValueError as error:
        return str(error), RUNS[how](q.detach(), k, v, "na(window=3x3)", slabs)
    return "", None


def distributed(rank):
    """The error of a call with a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    layout = Layout((4, 3))
    q, k, v, _ = tensors(layout, 8)
    shared = distribute_tensor(k, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(2)])
    try:
        attention(q, shared, v, "na(window=3x3)", layout)
    except ValueError as error:
        return str(error)
    return ""
