"""First derivatives of what travels between processes; second ones are refused, for nothing would send theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of messages that raises a ValueError where somebody asks for the graph of its gradients."""

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "attention over several processes has first derivatives only: leave create_graph=True out, or call "
                "attention() in one process"
            )
        return backward(*args)

    return run
