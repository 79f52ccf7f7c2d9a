"""Where the tokens of a vision tower sit, from its configuration and the arguments of one of its modules.

Every reader takes the configuration and the arguments by name and gives what `Run.start` takes. It runs while
torch.compile traces too, so it computes nothing from the values of tensors unless the tower needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visattn.layout import Layout
from visattn.runtime.forward import Where
from visattn.runtime.place import Samples

Args = Mapping[str, Any]
Reader = Callable[[Any, Args, int, int], Where]


@dataclass(frozen=True)
class Chunk:
    """The tokens of one call of a tower that attends image by image and frame by frame.

    Attributes:
        layout: Rows and columns.
        merge: Side of the blocks by which its tokens are ordered, 1 for row by row.
        window: Side in blocks of the windows by which the blocks are, 0 for row by row.
    """

    layout: Layout
    merge: int
    window: int = 0


@dataclass(frozen=True)
class Sorted:
    """The tokens of one call of a tower that sorts them by the pooling to come.

    Attributes:
        layout: Rows and columns.
        stride: Of the pooling, of rows and columns.
        times: How often they are pooled from here on.
    """

    layout: Layout
    stride: tuple[int, int]
    times: int


@dataclass(frozen=True)
class Chunks(Samples):
    """Where the tokens of one forward of such a tower sit.

    Attributes:
        calls: Of each call that a module makes, in their order.
    """

    calls: tuple[Chunk, ...] = ()


@dataclass(frozen=True)
class Stages(Samples):
    """Where the tokens of one forward of a tower sit that pools them from stage to stage.

    Attributes:
        stages: Of each stage, the first one first.
    """

    stages: tuple[Sorted, ...] = ()

    def of(self, length: int) -> Sorted | None:
        """The stage whose sequence is that long, None if there is none."""
        return next((stage for stage in self.stages if stage.layout.tokens == length), None)


def pair(value: Any) -> tuple[int, int]:
    """Two sides of one number or of two."""
    return (int(value[-2]), int(value[-1])) if isinstance(value, list | tuple) else (int(value), int(value))


def image(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Rows and columns of patches of `pixel_values` [B, C, H, W]."""
    pixels = args.get("pixel_values")
    if pixels is None or pixels.ndim != 4:
        return Samples(why="it got no pixel_values [B, C, H, W]")
    return _grid((), pixels.shape[-2:], config, prefix, suffix)


def video(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Frames, rows and columns of tubelets of `pixel_values` or `pixel_values_videos` [B, T, C, H, W]."""
    pixels = args.get("pixel_values", args.get("pixel_values_videos"))
    if pixels is None or pixels.ndim != 5:
        return Samples(why="it got no pixels [B, T, C, H, W]")
    if args.get("bool_masked_pos") is not None:
        return Samples(why="bool_masked_pos drops tokens, and the rest is no grid")
    size = config.tubelet_size
    tubelet = size[0] if isinstance(size, list | tuple) else size
    return _grid((max(pixels.shape[1] // tubelet, 1),), pixels.shape[-2:], config, prefix, suffix)


def _grid(frames: tuple[int, ...], sides: Any, config: Any, prefix: int, suffix: int) -> Where:
    size = getattr(config, "patch_size", None) or config.tubelet_size
    rows, columns = (int(n) // p for n, p in zip(sides, pair(size), strict=True))
    if not rows or not columns:
        return Samples(why=f"an image of {sides[0]} x {sides[1]} pixels has no patch of {size}")
    return Samples((Layout((*frames, rows, columns), prefix, suffix),))


def shapes(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Rows and columns of each sample from `spatial_shapes` [B, 2]; a mask hides the padding after them."""
    found = args["spatial_shapes"].tolist()
    return Samples(tuple(Layout((rows, columns), prefix, suffix) for rows, columns in found), padded=True)


def frames(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """One call for each frame of each image from `grid_thw` [images, 3]; tokens are ordered by merged blocks."""
    merge = int(config.spatial_merge_size)
    size = getattr(config, "window_size", None)
    window = 0 if size is None else int(size) // merge // int(config.patch_size)
    calls = tuple(
        Chunk(Layout((rows, columns)), merge, window)
        for count, rows, columns in args["grid_thw"].tolist()
        for _ in range(count)
    )
    return Chunks(why="its sequence holds several images: they are attended one by one", calls=calls)


def each_frame(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Rows and columns of patches of `pixel_values` [B, T, C, H, W], of a tower that attends frame by frame."""
    pixels = args.get("pixel_values")
    if pixels is None or pixels.ndim != 5:
        return Samples(why="it got no pixel_values [B, T, C, H, W]")
    if config.attention_type == "joint_space_time":
        return Samples(why="its frames alternate within each place, and the rest is no grid of frames")
    return _grid((), pixels.shape[-2:], config, prefix, suffix)


def pooled(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Rows and columns of each stage of `pixel_values` [B, C, H, W], whose tokens are sorted by the pooling to come."""
    pixels = args.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or args.get("noise") is not None:
        return Samples(why="it got no pixel_values [B, C, H, W], or drops some of them")
    sides = tuple(int(n) // p for n, p in zip(pixels.shape[-2:], pair(config.patch_stride), strict=True))
    stride, last = pair(config.query_stride), len(config.depths) - 1
    if any(n % s**last for n, s in zip(sides, stride, strict=True)):
        return Samples(why=f"its {sides[0]} x {sides[1]} patches are not {last} times divisible by {stride}")
    grids = [tuple(n // s**i for n, s in zip(sides, stride, strict=True)) for i in range(config.num_query_pool + 1)]
    stages = tuple(Sorted(Layout(grid), stride, last - i) for i, grid in enumerate(grids))
    return Stages(why="its sequence has the length of no stage", stages=stages)


def elsewhere(config: Any, args: Args, prefix: int, suffix: int) -> Where:
    """Nothing: each attention module is told its rows and columns, see `of_map` and `of_sides`."""
    return Samples(why="its attention module was not told rows and columns")


def of_map(args: Args) -> Layout:
    """Rows and columns of a map [B, H, W, C]."""
    x = args["hidden_states"]
    return Layout((int(x.shape[1]), int(x.shape[2])))


def of_dimensions(args: Args) -> Layout:
    """Rows and columns that a module is told as `input_dimensions`."""
    rows, columns = args["input_dimensions"]
    return Layout((int(rows), int(columns)))


def of_sides(args: Args) -> Layout:
    """Rows and columns that a module is told as `height` and `width`."""
    return Layout((int(args["height"]), int(args["width"])))
