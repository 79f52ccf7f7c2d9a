"""Projections of diffusers' modules that are fused: one layer in the place of three."""

from __future__ import annotations

from typing import Any


class Unfusable:
    """What stands for the `fuse_projections` of a module whose key heads are shared.

    Args:
        path: Of the module.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.path} has key heads that query heads share, and a fused projection would give each query head its "
            "own: leave the projections as they are, or remove() what convert_heads gave"
        )


def is_fused(module: Any) -> bool:
    """Whether an attention module of diffusers runs one projection in the place of three."""
    # Older classes keep saying that they are fused, and only their processor tells.
    return getattr(module, "fused_projections", False) and (
        hasattr(module, "unfuse_projections") or type(module.processor).__name__.startswith("Fused")
    )
