"""Processes of a launcher (torchrun, accelerate launch) that train together: each has a share of every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from visattn.parallel.processes import Place, started_together, together


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """This process among those that a launcher has started, or alone; see `visattn.parallel.together`."""
    if dist.is_initialized():
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    elif started_together():
        with together("cuda" if device.startswith("cuda") else device) as place:
            yield place
    else:
        yield Place(0, 1, device)


def share_of(batch: int, place: Place) -> slice:
    """The samples of a step's batch that a process runs.

    Raises:
        ValueError: If the batch cannot be shared evenly.
    """
    if batch % place.world:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {place.world} processes: pass a multiple")
    own = batch // place.world
    return slice(place.rank * own, (place.rank + 1) * own)


def mean_gradients(parameters: Iterable[nn.Parameter], place: Place) -> None:
    """Gives every process the mean of all processes' gradients, in one exchange."""
    if place.world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, (flat / place.world).split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def mean_of(x: torch.Tensor, place: Place) -> torch.Tensor:
    """The mean of a number over all processes."""
    if place.world > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x / place.world


def agreed(number: float, place: Place) -> float:
    """The first process's number: clocks differ, and what all do next must not."""
    if place.world == 1:
        return number
    told = torch.tensor(number, dtype=torch.float64, device=place.device)
    dist.broadcast(told, 0)
    return float(told)
