"""Time of every candidate configuration of the Triton kernels on a case of scripts.bench.gpu.

    python3 -m scripts.bench.sweep_gpu [--jobs 14] [--only flux-s1 ...] [--directions forward] \
        [--configs 128x128x8x2x2 ...]

A configuration is rows x columns x warps x stages x tiles per step. Compiles in `--jobs` processes first, then times
one after the other. Prints a line each; times are of one direction with all heads.
"""

from __future__ import annotations

import argparse
import sys

import torch

from scripts.bench.gpu import CASES, DIM, HEADS
from scripts.gpu_common import compile_first
from visattn import parse
from visattn.kernels.triton import tune
from visattn.kernels.triton.backend import architecture
from visattn.kernels.triton.config import DIRECTIONS, Config, config


def configuration(text: str) -> Config:
    """A configuration from rows x columns x warps x stages [x tiles per step [x 1 for Hopper's kernel]].

    Raises:
        argparse.ArgumentTypeError: If it is anything else.
    """
    numbers = text.split("x")
    if not 4 <= len(numbers) <= 6 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no configuration: give 4 to 6 numbers, as in 128x128x8x2x2")
    rows, columns, warps, stages, *more = map(int, numbers)
    return Config(rows, columns, warps, stages, more[0] if more else 1, hopper=more[1:] == [1])


def main() -> int:
    """Compile, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--only", nargs="*", default=["flux-s1"])
    parser.add_argument("--directions", nargs="*", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--configs", nargs="*", type=configuration, default=[])
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    tune.HEADS = HEADS
    todo = []
    for name in chosen.only:
        for direction in chosen.directions:
            for launch in chosen.configs or tune.candidates(90, torch.bfloat16, DIM, direction):
                todo.append((name, direction, launch))
    if not chosen.compile and chosen.jobs > 1:
        compile_first(chosen.jobs)
    if chosen.compile:
        index, of = map(int, chosen.compile.split("/"))
        todo = todo[index::of]
    for name, direction, launch in todo:
        pattern, layout = CASES[name]
        base = {d: config(architecture(device), torch.bfloat16, DIM, d) for d in DIRECTIONS}
        clock = tune.timer(parse(pattern), layout, torch.bfloat16, DIM, device, direction, base)
        try:
            ms = f"{clock(launch):9.3f} ms"
        except Exception as error:
            ms = f"{type(error).__name__}: {str(error)[:80]}"
        if not chosen.compile:
            mark = " (table)" if launch == config(90, torch.bfloat16, DIM, direction) else ""
            print(f"{name:<16}{direction:<12}{'x'.join(map(str, launch[:5])):<18}{ms}{mark}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
