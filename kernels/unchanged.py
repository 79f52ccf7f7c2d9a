"""What a backward reads again must be what the forward read: torch looks at saved tensors, and here others are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def savable(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as `save_for_backward` takes it: one that was made in inference mode as a copy."""
    return mask.clone() if mask is not None and mask.is_inference() else mask


def once_more(compute: Callable[P, T], read: Iterable[torch.Tensor | None]) -> Callable[P, T]:
    """A function that a checkpoint calls again in the backward, for which nothing may have changed.

    Args:
        compute: The function.
        read: The tensors that it reads besides its arguments.

    Raises:
        RuntimeError: When it is called after one of them was changed in place.
    """
    own = [t for t in read if t is not None and not t.is_inference()]
    before = [t._version for t in own]

    def run(*args: P.args, **options: P.kwargs) -> T:
        if [t._version for t in own] != before:
            raise RuntimeError(
                "one of the tensors of an attention call has been modified by an inplace operation, and its backward "
                "reads it again: change a copy of it, or after the backward"
            )
        return compute(*args, **options)

    return run
