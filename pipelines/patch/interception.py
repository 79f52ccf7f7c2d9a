"""Processors whose code does not show how they call attention: it is seen while they run.

They may take torch's SDPA under another name, through a helper, a parent's method or a decorator, or compute attention
by themselves. What cannot be intercepted is counted, with that reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from visattn.pipelines.patch import dispatch, numbering
from visattn.pipelines.patch.calling import computes_itself


class Interception(TorchFunctionMode):
    """Sends every call of torch's SDPA below it to a group.

    Attributes:
        seen: How many there were.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.sdpa, self.seen = dispatch.sdpa(number), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of each of its functions."""
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen += 1
        return self.sdpa(*args, **(kwargs or {}))


def intercepted(call: Callable[..., Any], number: int, processor: Any = None) -> Callable[..., Any]:
    """The call of a processor with its attention sent to a group.

    Args:
        call: A method of processors, which takes one first, or what `processor` stands for.
        number: Of the group.
        processor: The processor, None if it is the first argument.
    """

    # What a client's code does is not known to be traceable under a mode.
    @functools.partial(torch.compiler.disable, reason="visattn watches how this processor calls attention")
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        group = numbering.look_up(number)
        if group is None:
            return call(*args, **kwargs)
        with Interception(number) as mode:
            out = call(*args, **kwargs)
        if not mode.seen:
            own = args[0] if processor is None else processor._visattn_original
            group.pass_by(group.run.site, computes_itself(own))
        return out

    # diffusers passes a processor what its signature names.
    run.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    return run
