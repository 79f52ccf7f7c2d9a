"""Operators of torch with Python bodies, with as little as torch allows between a caller and the body.

`torch.library.custom_op` puts several Python layers around every call, which take longer than a prepared call of
attention does. Here the body is what the dispatcher calls, and the layer of autograd is the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "visattn"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator without a gradient that changes none of its arguments.

    Args:
        name: Its name after "visattn::".
        body: What it does on every device. It returns tensors that alias no argument, with the strides of the fake's.
        fake: What comes out, for tracing.

    Returns:
        The operator; its schema is from the annotations of the body.
    """
    schema = torch.library.infer_schema(body, mutates_args=())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def above(operator: Any, layer: Callable[..., Any]) -> None:
    """Make `layer` what runs for an operator where autograd would: it gets the arguments and calls `below`."""
    _library.impl(operator._opname, layer, "Autograd")


def below(operator: Any, *given: Any) -> Any:
    """Call an operator below autograd: its body, or what tracers and modes make of it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*given)
