"""Pixels as files: pictures, MP4 videos, animated WebP, and contact sheets of a video's frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visattn.canvas import GAP, Picture, column, row, text

# Pictures smaller than this are shown enlarged, so that one can see their pixels.
READABLE = 256
# Frames on a contact sheet and the height of one, at least and at most.
MOST_FRAMES = 16
FRAME_HEIGHTS = (64, 160)
# Constant rate factor of H.264: 0 is lossless, 23 the default; at 12 one sees no difference.
QUALITY = "12"
WEBP_QUALITY = 90

Pixels = NDArray[np.float32]


def need_encoder() -> None:
    """Checks that MP4 files can be written.

    Raises:
        ValueError: If PyAV is missing.
    """
    if importlib.util.find_spec("av") is None:
        raise ValueError("videos need PyAV: pip install av, or pip install 'visattn[diffusers]'")


def to_bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """Values 0 to 1 as 0 to 255."""
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def to_picture(pixels: Pixels) -> Picture:
    """Values 0 to 1 [height, width, 1 or 3] as a picture."""
    whole = to_bytes(pixels)
    return Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)


def write_mp4(path: Path, pixels: Pixels, fps: int) -> None:
    """Write a video as H.264; small frames are enlarged by a whole factor, each pixel a square.

    Args:
        path: The file.
        pixels: [frames, height, width, 1 or 3], values 0 to 1.
        fps: Frames per second.
    """
    import av

    whole = np.stack([np.asarray(readable(to_picture(frame))) for frame in pixels])
    # H.264 shares colors between 2x2 pixels: odd sides get their last row or column twice.
    whole = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": QUALITY})
        stream.height, stream.width = whole.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in whole:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_webp(path: Path, frames: Sequence[Picture], fps: int) -> None:
    """Write pictures as an animated WebP that goes round: what a page shows as a picture, without a player.

    Args:
        path: The file.
        frames: Of one size.
        fps: Frames per second.
    """
    first, *others = frames
    # Small files matter more than this format's lossless mode: H.264 beside it is close to the pixels.
    options = {"duration": round(1000 / fps), "loop": 0, "quality": WEBP_QUALITY, "method": 4}
    first.save(path, "WEBP", save_all=True, append_images=others, **options)


def readable(picture: Picture) -> Picture:
    """A small picture in colour, enlarged by a whole factor, each pixel a square."""
    factor = max(1, READABLE // min(picture.size))
    size = picture.width * factor, picture.height * factor
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def contact_sheet(videos: Mapping[str, Pixels]) -> Picture:
    """Frames in a row, one row for each video, with its name; long videos show frames evenly spread.

    Args:
        videos: Name and pixels [frames, height, width, 1 or 3] of each, values 0 to 1.
    """
    rows = []
    for name, pixels in videos.items():
        shown = np.linspace(0, len(pixels) - 1, min(len(pixels), MOST_FRAMES)).round().astype(int)
        frames = [_fit(to_picture(pixels[i])) for i in shown]
        rows.append(column([text(f"{name}, frames {shown[0]} to {shown[-1]}", size=13), row(frames, gap=2)], gap=4))
    return column(rows, margin=GAP)


def _fit(picture: Picture) -> Picture:
    """A frame of the contact sheet: enlarged by a whole factor, or scaled down smoothly."""
    low, high = FRAME_HEIGHTS
    color = picture.convert("RGB")
    if color.height < low:
        factor = -(-low // color.height)
        return color.resize((color.width * factor, color.height * factor), Image.Resampling.NEAREST)
    if color.height > high:
        return color.resize((max(1, round(color.width * high / color.height)), high), Image.Resampling.LANCZOS)
    return color
