"""What the video decoder of LTX-2.5 gains from our kernels: its own windows by them, by FlexAttention, and dense.

    python3 -m scripts.bench.decoder_gpu [--budget 60] [--out docs/results/h200-decoder.json]

The sizes are those of a clip of 121 frames of 512 x 768 pixels, stage by stage; windows, heads and widths are the
defaults of `LTX2VideoDiffusionDecoderModel`. Each result is compared with float64 on sampled queries. FlexAttention
gets the mask that the class makes, built and run by torch.compile, since uncompiled it makes every logit. Stages for
which the budget leaves no time are left out and named. The diffusion stage runs alone: FlexAttention's mask of its
3 million tokens is not made within a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from scripts.bench.gpu import in_turns, median_ms
from scripts.gpu_common import go_on, sampled_error, versions
from visattn import Layout, attention, explain
from visattn.files import write_json

DIM = 64
# Above this, dense attention takes seconds.
DENSE_TOKENS = 500_000
ALLOWED = 0.01
# Above this, FlexAttention's mask is not made in reasonable time.
FLEX_TOKENS = 1_000_000
# Contenders take turns unless one of them takes longer.
SLOW_MS = 300


class Stage(NamedTuple):
    """Attention of one stage of the decoder.

    Attributes:
        grid: Frames, rows and columns.
        window: Tokens per axis that a query sees.
        heads: Attention heads.
        calls: How many blocks have it.
    """

    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    heads: int
    calls: int


# The deterministic stages carry two more latent frames (`trailing_pad_latent_frames` of the class); each upsampling
# in time leaves out its first frame.
STAGES = {
    "stage 1": Stage((18, 16, 24), (3, 7, 7), 32, 4),
    "stage 2": Stage((18, 32, 48), (3, 7, 7), 16, 6),
    "stage 3": Stage((35, 32, 48), (3, 5, 5), 8, 4),
    "stage 4": Stage((69, 64, 96), (3, 5, 5), 8, 2),
    "diffusion": Stage((121, 128, 192), (11, 11, 11), 4, 8),
}


def mask_of(stage: Stage) -> BlockMask:
    """The windows of a stage as FlexAttention takes them, shifted inward at borders."""
    _, rows, columns = stage.grid
    starts = []
    for size, width in zip(stage.grid, stage.window, strict=True):
        starts.append((torch.arange(size, device="cuda") - width // 2).clamp(0, size - width))
    token = torch.arange(stage.grid[0] * rows * columns, device="cuda")
    place = token // (rows * columns), token // columns % rows, token % columns
    first = [start[at] for start, at in zip(starts, place, strict=True)]

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        key = k // (rows * columns), k // columns % rows, k % columns
        inside = [(at >= low[q]) & (at < low[q] + w) for at, low, w in zip(key, first, stage.window, strict=True)]
        return inside[0] & inside[1] & inside[2]

    length = len(token)
    return create_block_mask(visible, None, None, length, length, device="cuda", _compile=True)


def flex_of(stage: Stage, heads: list[torch.Tensor]) -> Callable[[], Any]:
    """FlexAttention of q, k, v [B, H, S, D], compiled by a first call."""
    run = partial(torch.compile(flex_attention, dynamic=False), *heads, block_mask=mask_of(stage))
    run()
    torch.cuda.synchronize()
    return run


def measure(stage: Stage) -> Iterator[dict[str, Any]]:
    """Milliseconds of one call of a stage: by our kernels, then of all contenders in turns, or why one has none."""
    pattern, layout = f"na(window={'x'.join(map(str, stage.window))})", Layout(stage.grid)
    made = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn((1, layout.length, stage.heads, DIM), generator=made, device="cuda").bfloat16() for _ in range(3)
    )
    heads = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    row: dict[str, Any] = {"pattern": pattern, "layout": str(layout), "heads": stage.heads, "calls": stage.calls}
    row["backend"] = explain(pattern, layout, q).choice
    runs: dict[str, Callable[[], Any]] = {"visattn": partial(attention, q, k, v, pattern, layout)}
    begun = time.perf_counter()
    out = runs["visattn"]()
    torch.cuda.synchronize()
    row["first_call_s"] = time.perf_counter() - begun
    row["error"] = sampled_error(q, k, v, out, pattern, layout)
    row["visattn_ms"] = median_ms(runs["visattn"])
    yield row
    if layout.length > FLEX_TOKENS:
        return
    try:
        begun = time.perf_counter()
        runs["flex"] = flex_of(stage, heads)
        row["flex_first_call_s"] = time.perf_counter() - begun
        row["flex_error"] = sampled_error(q, k, v, runs["flex"]().transpose(1, 2), pattern, layout)
    except RuntimeError as error:
        runs.pop("flex", None)
        row["flex_fails"] = str(error).strip().partition("\n")[0]
    if layout.length <= DENSE_TOKENS:
        runs["dense"] = partial(scaled_dot_product_attention, *heads)
    slow = max(median_ms(run, 0.01) for run in runs.values()) > SLOW_MS
    times = {name: median_ms(run) for name, run in runs.items()} if slow else in_turns(runs)
    yield {**row, **{f"{name}_ms": ms for name, ms in times.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="seconds after which no further stage begins")
    parser.add_argument("--only", nargs="*", choices=STAGES, help="stages, all if left out")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    found: dict[str, Any] = {"versions": versions(), "clip": "121 frames of 512x768", "stages": {}, "left_out": []}
    go_on(found, options.out, "stages")
    begun, wrong = time.perf_counter(), []
    for name in options.only or ("diffusion", "stage 4", "stage 3", "stage 2", "stage 1"):
        if time.perf_counter() - begun > options.budget:
            found["left_out"].append(name)
            continue
        for row in measure(STAGES[name]):
            found["stages"][name] = row
            print(f"{time.perf_counter() - begun:5.1f} s {name}: {row}", flush=True)
            if options.out:
                write_json(options.out, found)
        row = found["stages"][name]
        wrong += [name] if max(row["error"], row.get("flex_error", 0)) > ALLOWED else []
        torch.cuda.empty_cache()
    print(f"left out: {', '.join(found['left_out']) or 'nothing'}; wrong: {', '.join(wrong) or 'nothing'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
