"""What the compiler is to see of hooks: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo import eval_frame
from torch._dynamo.eval_frame import skip_code


def own_frame(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the compiler from making a graph of its own of a hook that is called outside of graphs."""
    skip_code(hook.__code__)
    return hook


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the compiler out of a function and all it calls."""
    return torch.compiler.disable(function)  # type: ignore[arg-type]


# The compiler that would trace what this thread calls, None if there is none; where torch does not tell, there may be.
compiler_in_force: Callable[[], Any] = getattr(eval_frame, "get_eval_frame_callback", lambda: own_frame)


def unpatched(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copy of a patched model."""
