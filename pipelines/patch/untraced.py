"""Functions that the compiler leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the compiler out of a function and all it calls."""
    return torch.compiler.disable(function)
