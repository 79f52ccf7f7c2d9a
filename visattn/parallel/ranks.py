"""This process's place in a process group."""

from __future__ import annotations

import torch.distributed as dist

from visattn.parallel.slabs import Slabs


def checked_rank(slabs: Slabs, group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group.

    Raises:
        ValueError: If there is no group, or not as many ranks as slabs.
    """
    if not dist.is_initialized():
        raise ValueError("no process group: call torch.distributed.init_process_group first, under torchrun")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size != slabs.ranks or rank < 0:
        raise ValueError(f"{slabs.ranks} slabs {slabs.sizes} but the group has {size} ranks: pass a slab for each rank")
    return rank
