"""Maps as pictures: colours, mosaics of frames, strips of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visattn.canvas import Picture, column, row, text

# Dark blue to yellow in steps that look equal to people with any colour vision, and in print.
_SCALE = np.array(
    [(33, 20, 76), (52, 70, 136), (45, 112, 142), (34, 152, 137), (83, 188, 103), (173, 219, 58), (253, 231, 55)], float
)
_BELOW, _ABOVE = np.array((33, 102, 172), float), np.array((178, 24, 43), float)
_NOTHING = 255
# Pixels of a map's longer side.
SIDE = 192


def colors(values: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Values as colours [..., 3]; NaN is white."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    at = np.nan_to_num(share) * (len(_SCALE) - 1)
    first = np.minimum(at.astype(int), len(_SCALE) - 2)
    mixed = _SCALE[first] + (at - first)[..., None] * (_SCALE[first + 1] - _SCALE[first])
    return np.where(np.isnan(values)[..., None], _NOTHING, mixed.round()).astype(np.uint8)


def signed(values: NDArray, most: float) -> NDArray[np.uint8]:
    """Values below and above zero in blue and red [..., 3], white at zero and where there is nothing."""
    share = np.clip(np.nan_to_num(values) / max(most, 1e-12), -1, 1)[..., None]
    end = np.where(share < 0, _BELOW, _ABOVE)
    return (255 + np.abs(share) * (end - 255)).round().astype(np.uint8)


def color(share: float) -> tuple[int, int, int]:
    """The colour of a share from 0 to 1."""
    red, green, blue = colors(np.array(share, float), 0, 1).tolist()
    return red, green, blue


def plane(values: torch.Tensor | NDArray, grid: Sequence[int]) -> NDArray:
    """Values on a grid [tokens] as a plane: frames beside and below each other, NaN between; lines are folded."""
    flat = np.asarray(values, dtype=float).reshape(-1)
    if len(grid) == 1:
        width = min(grid[0], 2 ** math.ceil(math.log2(math.sqrt(grid[0])) + 1))
        rows = -(-grid[0] // width)
        return np.pad(flat, (0, rows * width - len(flat)), constant_values=np.nan).reshape(rows, width)
    if len(grid) == 2:
        return flat.reshape(tuple(grid))
    frames, height, width = grid
    across = math.ceil(math.sqrt(frames * height / width))
    down = -(-frames // across)
    found = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for frame, one in enumerate(flat.reshape(frames, height, width)):
        y, x = frame // across * (height + 1), frame % across * (width + 1)
        found[y : y + height, x : x + width] = one
    return found


def rooted(weights: NDArray) -> NDArray[np.uint8]:
    """Weights as colours of their square roots: a few large ones leave the others visible."""
    return colors(np.sqrt(np.clip(weights, 0, None)), 0, float(np.sqrt(np.nanmax(weights))))


def picture(values: NDArray, side: int = SIDE) -> Picture:
    """Colours [height, width, 3] as a picture whose longer side has about so many pixels."""
    factor = max(1, side // max(values.shape[:2]))
    return Image.fromarray(values.repeat(factor, 0).repeat(factor, 1))


def strip(planes: Sequence[NDArray], most: float | None = None, side: int = SIDE) -> Picture:
    """Maps of all heads of a layer, each scaled to its own largest value; `most` makes them signed.

    Args:
        planes: One a head.
        most: Largest absolute value of signed maps.
        side: Pixels of a map's longer side.
    """
    made = [picture(rooted(one) if most is None else signed(one, most), side) for one in planes]
    return row([column([text(f"head {i}", size=12), each], gap=2) for i, each in enumerate(made)], gap=6, wrap=1080)


def high(values: NDArray) -> float:
    """Where a map's scale ends: few large values do not leave all others dark."""
    return float(np.nanquantile(values, 0.99)) or float(np.nanmax(values))


def over(image: Picture, values: NDArray, share: float = 0.75) -> Picture:
    """A map laid over a picture, smoothly enlarged."""
    heat = Image.fromarray(colors(values, 0, high(values))).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("RGB"), heat, share)


def enlarged(image: Picture, side: int = 320) -> Picture:
    """A picture whose longer side has about so many pixels: small ones by whole factors, large ones smoothly."""
    longest = max(image.size)
    if longest < side:
        factor = side // longest
        return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
