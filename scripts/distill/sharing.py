"""What processes share of a run: weights and optimizer states (FSDP2), or the tokens of each sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def share_weights(learner: Any, device: torch.device) -> None:
    """Gives each process a part of every weight of teacher and student: blocks are whole only while they run.

    Args:
        learner: Has both; the parameters that its `trained` gives afterwards are parts too.
        device: Of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in (learner.teacher, learner.student):
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
    # What is left of the student, and what the pattern brings; it stays whole through a step, as the rest of the
    # teacher does all the time.
    fully_shard(learner, mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what its outermost lists hold, but the first, which some models reach into."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child)[1:] if isinstance(child, nn.ModuleList | nn.Sequential) else blocks(child)
    return [block for block in found if next(block.parameters(), None) is not None]


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of which processes may have parts; every process makes this call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor as another one is: shared over the same processes if that is."""
    if not isinstance(own, DTensor):
        return x
    return distribute_tensor(x.to(own.device), own.device_mesh, own.placements)


def sequence_mesh(device: torch.device, processes: int, sequence: int) -> Any:
    """The processes that share this one's samples, as a mesh of one axis; None if none do.

    Raises:
        ValueError: If the processes cannot be grouped so.
    """
    if sequence == 1:
        return None
    if processes % sequence:
        raise ValueError(
            f"--sequence {sequence} must divide the number of processes, {processes}: start with accelerate launch "
            f"--num_processes {sequence}"
        )
    from torch.distributed.device_mesh import init_device_mesh

    names = ("data", "sequence")
    return init_device_mesh(device.type, (processes // sequence, sequence), mesh_dim_names=names)["sequence"]
