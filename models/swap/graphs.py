"""Swapped models in graphs of torch.fx: feature extractors of torchvision and timm, quantization, symbolic_trace.

Each swapped module is one node of the graph, which calls it, and so is the patch embedding, whose hook sees the grid of
the image that the graph runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.fx import Node, Proxy


def proxy_among(things: Iterable[Any]) -> Proxy | None:
    """The first stand-in that torch.fx traces a module with, None in a real call."""
    return next((thing for thing in things if isinstance(thing, Proxy)), None)


def as_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward that torch.fx records as one call of the module, whatever the tracer takes for a leaf."""

    @functools.wraps(forward)
    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Every forward passes here: one look at its tokens, which come first.
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Proxy):
            return forward(self, *args, **kwargs)
        tracer: Any = first.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    return recorded


def again_as_node(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Proxy:
    """What a forward hook gives for the output of a module that was traced through: one call of the module instead.

    So the module's hooks see the tensors of each run of the graph. What was traced inside stays where the tracer has
    names for it (feature extractors may return it, and drop it otherwise), and is taken back elsewhere.

    Raises:
        ValueError: If the module gives more than one tensor.
    """
    if not isinstance(out, Proxy):
        raise ValueError(
            f"{type(module).__name__} gives several outputs, whose grid a graph of torch.fx cannot follow: take "
            "features by forward_intermediates() or by hooks"
        )
    tracer: Any = out.tracer
    if not hasattr(tracer, "node_to_qualname"):
        _erase(out.node, {thing.node for thing in (*args, *kwargs.values()) if isinstance(thing, Proxy)})
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def _erase(node: Node, kept: set[Node]) -> None:
    """Take a node that nobody uses out of its graph, and what only it used."""
    if node in kept or node.users or node.op == "placeholder":
        return
    before = node.all_input_nodes
    node.graph.erase_node(node)
    for each in before:
        _erase(each, kept)
