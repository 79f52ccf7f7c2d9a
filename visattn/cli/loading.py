"""Pipelines for commands that run one, with bars where somebody sees them."""

from __future__ import annotations

import sys
from typing import Any


def is_watched() -> bool:
    """Whether progress goes to a terminal; in a file its bars would be noise."""
    return sys.stderr.isatty()


def no_loading_bars() -> None:
    """Loading shows no bars, neither of diffusers nor of transformers, where that is installed."""
    import importlib.util

    for library in ("diffusers", "transformers"):
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def loaded_pipeline(model: str, device: str, dtype: str | None, *, bars: bool) -> Any:
    """A pipeline on a device.

    Args:
        model: As in `load_pipeline`.
        device: A name, or "auto" for a GPU if there is one.
        dtype: As in `load_pipeline`.
        bars: Whether its denoising shows a bar on a terminal; commands with progress of their own take none.

    Raises:
        ValueError: If the model cannot be found or read, or device or dtype do not exist.
    """
    from visattn.environment import chosen_device
    from visattn.pipelines.load import load_pipeline

    if not is_watched():
        no_loading_bars()
    pipe = load_pipeline(model, chosen_device(device), dtype)
    pipe.set_progress_bar_config(disable=not (bars and is_watched()))
    return pipe
