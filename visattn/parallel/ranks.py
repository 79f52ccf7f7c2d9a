"""This process's place in a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from visattn import transforms
from visattn.autocast import as_sdpa_casts
from visattn.checks import check_fit, check_tensors, factor, other_values
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


def own_tensors(
    q: Any, k: Any, v: Any, local: Layout, key_mask: Any, scale: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's queries, keys and values, cast as autocast wants them: what travels is cast before.

    Raises:
        ValueError: If they are not of this rank's tokens; before others wait for a message.
    """
    if transforms.active():
        raise ValueError(
            "attention over several processes has gradients by autograd alone, nothing under torch.func or in forward "
            "mode: call backward() or torch.autograd.grad, or attention() in one process"
        )
    # Values may have other channels than keys.
    check_tensors(q, k, k if other_values(q, k, v) else v, local)
    factor(scale, q.shape[3])
    q, k, v = as_sdpa_casts(q, k, v)
    check_fit(q, k, v, Dense(), local, key_mask, None, {})
    return q, k, v
