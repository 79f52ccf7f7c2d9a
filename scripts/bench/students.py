"""Times the digits model with the attention of every student: attention computed, and wall time per image.

    python -m scripts.bench.students --out docs/results/students.json

At the size of its training (64 px, 1024 tokens) and at twice the side (4096 tokens). Weights make no difference to the
time, so nothing is trained; dense attention and the students take turns in one process. Stop it at any time: sizes that
are done are not measured again by the same command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.distill.digits_students import STEPS, STUDENTS
from visattn import Layout, apply, parse, plan
from visattn.environment import devices, versions
from visattn.files import written_whole
from visattn.patterns import Agent, Linear, Mala, Pattern
from visattn.patterns.linear import feature_channels
from visattn.pipelines.embedded import load_embedded
from visattn.timing import interleave

SIZES = (64, 128)


def computed(pattern: Pattern, layout: Layout, head_dim: int) -> float:
    """Multiplications of a pattern's attention as a share of dense attention's, 2 S^2 D per head.

    Lists of tiles: the share of visible pairs. Agent attention meets every agent twice, 4 S A D. Linear attention sums
    and reads states of F x D, 2 S F D, and maps queries and keys, 2 S D^2, where the map is learnable.
    """
    tokens, pairs = layout.length, 2 * layout.length**2 * head_dim
    if isinstance(pattern, Agent):
        return 4 * tokens * pattern.count(layout.grid) * head_dim / pairs
    if isinstance(pattern, Linear):
        maps = 2 * tokens * head_dim**2 if pattern.learnable else 0
        return (2 * tokens * feature_channels(pattern.feature, head_dim) * head_dim + maps) / pairs
    if isinstance(pattern, Mala):
        return 2 * tokens * head_dim**2 / pairs
    return plan(pattern, layout).density


def draw(pipe: Any, size: int, pattern: str | None) -> float:
    """Makes one image; returns the seconds of it spent in attention, 0 where visattn does not know."""
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": STEPS, "output_type": "pt"}
    if pattern is None:
        pipe([3], latents=noise, **options)
        return 0.0
    with apply(pipe, pattern, strict=True) as handle:
        pipe([3], latents=noise, **options)
        return sum(site.sparse_seconds + site.dense_seconds for site in handle.report().sites)


def measure(pipe: Any, size: int, names: list[str], repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """All students at one size; seconds of attention are wall time whatever the clock."""
    config = pipe.transformer.config
    layout = Layout((size // config.patch_size,) * 2)
    patterns = {name: STUDENTS[name][0] for name in names}
    # Dense attention by visattn too, so that its time is known in the same way.
    every = {"dense": "dense"} | patterns
    attention: dict[str, list[float]] = {name: [] for name in every}

    def run(name: str, pattern: str) -> None:
        attention[name].append(draw(pipe, size, pattern))

    runs = {name: partial(run, name, pattern) for name, pattern in every.items()}
    times = interleave({"stock": partial(draw, pipe, size, None), **runs}, repeats=repeats, clock=clock)
    # The warm-up's is not counted.
    inside = {name: statistics.median(seconds[1:]) for name, seconds in attention.items()}
    found: dict[str, Any] = {"tokens": layout.length}
    found["stock"] = {"pattern": "dense", "computed": 1.0, "attention": inside["dense"], **times["stock"].to_dict()}
    for name, pattern in patterns.items():
        share = computed(parse(pattern), layout, config.attention_head_dim)
        found[name] = {"pattern": pattern, "computed": share, "attention": inside[name], **times[name].to_dict()}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="sides of the image in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--process-time", action="store_true", help="CPU time of the process instead of wall time, for a busy machine"
    )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipe: Any = load_embedded("digits").to(options.device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"students": options.students, "repeats": options.repeats, "steps": STEPS, "threads": options.threads}
    settings |= {"versions": versions(), "devices": devices(), "device": options.device}
    settings |= {"process_time": options.process_time}
    known = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    sizes = known["sizes"] if known.get("settings") == settings else {}
    clock = time.process_time if options.process_time else time.perf_counter
    for size in options.sizes:
        if str(size) not in sizes:
            sizes[str(size)] = measure(pipe, size, options.students, options.repeats, clock)
        for name in ("stock", *options.students):
            row = sizes[str(size)][name]
            print(f"{size} px  {name:<10} {row['computed']:7.1%} computed  {row['median']:7.3f} s", flush=True)
        if options.out:
            with written_whole(options.out) as path:
                path.write_text(json.dumps({"settings": settings, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
