"""What the environment asks for: servers have no free options for attention, and workers inherit it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from visattn.dims import check_dims
from visattn.dispatch import load
from visattn.patterns import MergingPattern
from visattn.request import Request
from visattn.schedule import PatternLike, Schedule
from visattn.served.environment import BACKEND, CONFIG, DENSE_STEPS, PATTERN, STRICT

# Grids of what servers generate are of videos; an image is one frame.
DIMS = 3


def request(client: str, environment: Mapping[str, str] = os.environ) -> Request:
    """What the environment asks for.

    Args:
        client: What errors call the server.
        environment: Variables by name.

    Raises:
        ValueError: If it asks for nothing, for two things, or for something that no server can run.
    """
    text, file = environment.get(PATTERN, ""), environment.get(CONFIG, "")
    if bool(text) == bool(file):
        both = f"{PATTERN}={text!r} and {CONFIG}={file!r} both say" if text else f"neither {PATTERN} nor {CONFIG} says"
        raise ValueError(
            f"{both} what the attention of {client} is to be: set one, like {PATTERN}='na(window=(-1, 15, 15))'"
        )
    pattern: PatternLike = Path(file) if file else text
    schedule = Schedule.of(pattern, dense_steps=_steps(environment.get(DENSE_STEPS, "")))
    for each in schedule.patterns:
        if each.learnable or isinstance(each, MergingPattern):
            raise ValueError(f"{each} has parameters or merges tokens, which no layer of {client} does: use na(...)")
        check_dims(each, DIMS, client)
    backend = environment.get(BACKEND) or "auto"
    if backend != "auto":
        load(backend)
    strict = _switch(environment.get(STRICT, ""))
    return Request(schedule, backend, (), strict, strict)


def _steps(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text or 0)
    except ValueError:
        raise ValueError(f"{DENSE_STEPS}={text!r} must be a count of steps like 12 or a fraction like 0.25") from None


def _switch(text: str) -> bool:
    if text.lower() not in ("", "0", "1", "false", "true"):
        raise ValueError(f"{STRICT}={text!r} must be 0 or 1")
    return text.lower() in ("1", "true")
