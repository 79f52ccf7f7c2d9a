"""Parameters that are a share or a count."""

from __future__ import annotations

from typing import Any

import numpy as np

from visattn.patterns.values import LARGEST, is_number


def share_or_count(value: Any, name: str, low: int = 1) -> int | float:
    """Check a parameter that is a fraction above 0 and at most 1 (a float), or a count of at least `low`.

    Raises:
        ValueError: If it is anything else.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and low <= value <= LARGEST:
        return int(value)
    if not whole and is_number(value) and 0 < value <= 1:
        return float(value)
    raise ValueError(
        f"{name}={value!r} must be a fraction above 0 and at most 1, like 0.1, or a count of blocks like 12"
    )
