"""Whether all ranks make the same call: asked once for each kind of call, before what it exchanges travels."""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from visattn.parallel.slabs import Slabs
from visattn.patterns import Pattern

# By group, the calls that all its ranks have been seen to make. Nothing is forgotten before the group is: ranks that
# make the same calls must ask at the same ones.
_known: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def check_agreed(
    name: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: Pattern,
    slabs: Slabs,
    group: dist.ProcessGroup | None,
    **rest: Any,
) -> None:
    """Raise a ValueError on all ranks if some make another call.

    Transports end processes, or mix what two patterns see, where messages are not what the other side expects.

    Args:
        name: Of the function.
        tensors: A rank's q, k and v.
        pattern: The pattern.
        slabs: How the sequence is cut.
        group: The process group.
        rest: What else all must have alike.
    """
    if slabs.ranks == 1:
        return
    q, k, v = tensors
    learns = tuple(n for n, t in zip("qkv", tensors, strict=True) if t.requires_grad and torch.is_grad_enabled())
    about = (q.shape[0], (q.shape[2], k.shape[2]), (q.shape[3], v.shape[3]), q.dtype, learns, tuple(rest.items()))
    known = _known.setdefault(group or dist.group.WORLD, set())
    if (name, pattern, slabs, about) in known:
        return
    text = f"{name} of {pattern} on {slabs.layout} in {slabs.sizes} rows of axis {slabs.axis}, batch {about[0]}, heads "
    text += f"{about[1]}, channels {about[2]}, {q.dtype}, gradients of {' '.join(learns) or 'nothing'}"
    text += "".join(f", {key}={value}" for key, value in rest.items())
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    own = torch.tensor([digest], device=q.device)
    found = [torch.empty_like(own) for _ in range(slabs.ranks)]
    dist.all_gather(found, own, group=group)
    if any(int(other) != digest for other in found):
        texts: list[Any] = [None] * slabs.ranks
        dist.all_gather_object(texts, text, group=group)
        said = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(texts))
        raise ValueError(f"ranks make different calls, and all must make the same one: {said}")
    known.add((name, pattern, slabs, about))
