"""What was measured of a tuned schedule, as people read it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def in_words(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the figures of a file.

    Args:
        figures: `verified` of a tuned schedule.
    """
    return [(_name(name), _value(name, value)) for name, value in figures.items()]


def _name(name: str) -> str:
    shown = name.replace("attention_seconds", "time in attention").replace("seconds", "time of a sample")
    return re.sub("^(psnr|snr|ssim)", lambda found: found[0].upper(), shown.replace("_", " "))


def _value(name: str, value: Any) -> str:
    kind = name.removesuffix("_mean").removesuffix("_worst").removesuffix("_dense")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        # Only ratios to dense are left out, where they are infinite.
        return "equal to dense"
    if kind in ("seconds", "attention_seconds"):
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if kind in ("psnr", "snr"):
        return f"{value:.1f} dB"
    if kind == "accuracy_lost":
        return f"{value:+.2f} points"
    if kind == "accuracy":
        return f"{value:.1%}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
