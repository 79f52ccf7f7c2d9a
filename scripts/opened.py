"""Safetensors files that scripts read: one that is not whole is an error that a user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextmanager
def opened(path: Path, what: str, fix: str, needs: str = "") -> Iterator[Any]:
    """The file as `safetensors.safe_open` gives it.

    Args:
        path: The file.
        what: What it should be, as in "is no checkpoint".
        fix: What to do about one that is not.
        needs: Name in its metadata that tells it from other files, if there is one.

    Raises:
        ValueError: If it is missing, not whole or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {fix}")
    try:
        with safe_open(path, framework="pt") as file:
            if needs and needs not in (file.metadata() or {}):
                raise ValueError(f"{path} is no {what}: {fix}")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no {what}, or not whole ({error}): {fix}") from error
