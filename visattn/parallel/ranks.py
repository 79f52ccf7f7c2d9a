"""This process's place in a process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from visattn.checks import check_call, factor, other_values
from visattn.layout import Layout
from visattn.parallel.slabs import Slabs, check_slabs
from visattn.patterns import Dense


def checked_rank(slabs: Slabs, group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group.

    Raises:
        ValueError: If there is no group, or not as many ranks as slabs.
    """
    check_slabs(slabs)
    if not dist.is_initialized():
        raise ValueError("no process group: call torch.distributed.init_process_group first, under torchrun")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size != slabs.ranks or rank < 0:
        raise ValueError(f"{slabs.ranks} slabs {slabs.sizes} but the group has {size} ranks: pass a slab for each rank")
    return rank


def check_own(q: Any, k: Any, v: Any, local: Layout, key_mask: Any, scale: Any) -> None:
    """Raise a ValueError for tensors that are not of this rank's tokens, before others wait for a message."""
    check_call(q, k, k if other_values(q, k, v) else v, Dense(), local, key_mask, None)
    factor(scale, q.shape[3])
