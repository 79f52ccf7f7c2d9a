"""Where the tokens of a forward of vLLM-Omni sit, from what its models tell their attention."""

from __future__ import annotations

from typing import Any

from visattn.runtime.where import REST, Where


def where(metadata: Any) -> Where:
    """From the `AttentionMetadata` of a call, None for none.

    What is before the grid of the video, and what is after it, are a prefix and a suffix: text, sound, reference
    images, and the frames of all videos but the one that is generated.
    """
    layout = getattr(metadata, "video_layout", None)
    if layout is None:
        return Where((), why="its model does not tell the grid of its tokens (video_layout)")
    if getattr(metadata, "full_attn_spans", None) is not None:
        return Where((), why="it is causal but for spans of full attention")
    spans = getattr(layout, "video_spans", ())
    if spans:
        target = next((span for span in reversed(spans) if span.role == "target"), None)
        if target is None:
            return Where((), why="none of its videos is the one that is generated")
        return Where(_sides(target.latent_grid), int(target.start), REST)
    if layout.prefix_len is None or layout.latent_grid is None:
        return Where((), why="its model tells neither a grid nor spans of videos")
    return Where(_sides(layout.latent_grid), int(layout.prefix_len), REST)


def _sides(grid: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in grid)
