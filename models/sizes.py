"""Sizes of images in exported programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def check_fixed(size: Iterable[Any]) -> None:
    """Refuse to export a pattern for grids of any size.

    Args:
        size: Rows and columns of a grid.

    Raises:
        ValueError: If one of them is to stay open in a program that torch.export makes.
    """
    if torch.compiler.is_exporting() and any(isinstance(n, torch.SymInt) and n.node.constant is None for n in size):
        raise ValueError(
            "the pattern of an exported program is that of one grid: export with images of a fixed size, once for each"
        )
