"""Compile every shipped configuration for every architecture, without a GPU, and print what it needs.

    python -m visattn.kernels.triton.resources [--arch 80 90] [--dtype bfloat16] [--head-dim 64 128] [--kernel forward]

A row per architecture, dtype, head dim and kernel: registers per thread, spilled bytes per thread, shared memory per
program. Exit status 1 if one spills, needs more shared memory than the architecture has, or does not compile. `--bias`
compiles the variants with key mask and, where there is one, relative position bias. `--hip` adds AMD, as far as the
compiler goes; that never changes the exit status.

`--jobs` compiles in that many processes, `--shard 2/4` every fourth row from the second on, for machines that share the
table. What was compiled is kept in a folder (`--cache`, `--no-cache`) by a hash of the kernel's source, its arguments,
the target and the versions of Triton and its assembler. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from visattn.files import cache_folder
from visattn.kernels.triton.ahead import Resources, compiled
from visattn.kernels.triton.config import DIRECTIONS, HOPPER, SHARED_MEMORY, Config, config, largest_head_dim

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
# Bytes that the Hopper kernels may spill: numbers that are written before the loops, and read between them, in branches
# that a row tile takes once, or by the warps that copy and deal.
HOPPER_SPILLS = 72
# Bytes of a work-group's local memory on CDNA 3 (AMD CDNA 3 white paper).
AMD_MEMORY = 64 * 1024


@dataclass(frozen=True)
class Row:
    """What is compiled for one row of the table.

    Attributes:
        target: Compute capability times ten, or a name of AMD's.
        dtype: Name of the dtype.
        head_dim: Channels per head.
        kernel: Name of the kernel.
        launch: Its configuration.
        bias: Whether it is the variant with key mask and bias.
    """

    target: int | str
    dtype: str
    head_dim: int
    kernel: str
    launch: Config
    bias: bool

    def compile(self, folder: Path | None = None) -> Resources:
        """What it needs; `folder` is where results are kept."""
        return compiled(self.target, self.kernel, DTYPES[self.dtype], self.head_dim, self.launch, self.bias, folder)

    def fits(self, used: Resources, limit: int) -> bool:
        """Whether what it needs is what a shipped configuration may need."""
        return used.fits(limit, HOPPER_SPILLS if self.launch.hopper else 0)


def launch_of(architecture: int, dtype: torch.dtype, head_dim: int, kernel: str) -> Config:
    """The launch of a kernel on an architecture."""
    if kernel in DIRECTIONS:
        return config(architecture, dtype, head_dim, kernel)
    from visattn.kernels.triton import products

    return products.cases(dtype, head_dim, False)[kernel]()[2]


def rows(
    targets: Iterable[int | str], dtypes: list[str], head_dims: list[int], kernels: list[str], bias: bool
) -> Iterator[Row]:
    """The rows of the table."""
    for target, dtype, head_dim, kernel in product(targets, dtypes, head_dims, kernels):
        # AMD has no configurations of its own: those of the smallest NVIDIA memory, without deep pipelines.
        architecture = target if isinstance(target, int) else 86
        if head_dim <= largest_head_dim(DTYPES[dtype], architecture):
            launch = launch_of(architecture, DTYPES[dtype], head_dim, kernel)
            launch = launch if isinstance(target, int) else launch._replace(stages=min(2, launch.stages))
            yield Row(target, dtype, head_dim, kernel, launch, bias)
        special = HOPPER.get(kernel, {}).get(head_dim)
        if target == 90 and special and dtype != "float32":
            yield Row(target, dtype, head_dim, kernel, special, bias)


def kernel_names() -> tuple[str, ...]:
    """All kernels of the table."""
    from visattn.kernels.triton.products import NAMES

    return (*DIRECTIONS, *NAMES)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m visattn.kernels.triton.resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--head-dim", type=int, nargs="*", default=list(HEAD_DIMS), choices=list(HEAD_DIMS))
    parser.add_argument("--kernel", nargs="*", default=list(kernel_names()), choices=list(kernel_names()))
    parser.add_argument("--bias", action="store_true", help="the variants with key mask and relative position bias")
    parser.add_argument("--hip", nargs="?", const="gfx942", help="also compile for AMD (informative)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the table")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "resources", help="where results are kept")
    parser.add_argument("--no-cache", dest="cache", action="store_const", const=None, help="keep nothing")
    return parser.parse_args(arguments)


def _shard(text: str) -> tuple[int, int]:
    """Which part of how many."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part like 1/4, 2/4, 3/4 or 4/4")
    return int(part), int(parts)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    chosen = _arguments(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, which compiles nothing: unset it", file=sys.stderr)
        return 2
    print(f"{'arch':<7}{'dtype':<10}{'D':>4} {'kernel':<14}{'tile':>8}{'warps':>6}{'stages':>7}"
          f"{'regs':>6}{'spill':>7}{'shared':>9}{'limit':>9}  verdict")  # fmt: skip
    targets = [*chosen.arch, *([chosen.hip] if chosen.hip else [])]
    part, parts = chosen.shard
    todo = list(rows(targets, chosen.dtype, chosen.head_dim, chosen.kernel, chosen.bias))[part - 1 :: parts]
    bad = kept = 0
    began = time.monotonic()
    with multiprocessing.Pool(chosen.jobs) if chosen.jobs > 1 else nullcontext() as pool:
        compile_row = partial(Row.compile, folder=chosen.cache)
        results = pool.imap(compile_row, todo) if pool else map(compile_row, todo)
        for done, (row, used) in enumerate(zip(todo, results, strict=True), 1):
            limit = SHARED_MEMORY[row.target] if isinstance(row.target, int) else AMD_MEMORY
            bad += isinstance(row.target, int) and not row.fits(used, limit)
            kept += used.kept
            _print(row, used, limit)
            _progress(done, len(todo), kept, time.monotonic() - began)
    print(f"{bad} of the CUDA configurations do not fit" if bad else "every CUDA configuration fits")
    return int(bad > 0)


def _progress(done: int, total: int, kept: int, seconds: float) -> None:
    """Say how far the table is: in place on a terminal, else every twentieth row."""
    terminal, last = sys.stderr.isatty(), done == total
    if not (terminal or last or done % 20 == 0):
        return
    # Rows that were kept take no time to speak of.
    left = seconds / max(1, done - kept) * (total - done)
    text = f"{done} of {total} rows, {kept} of them kept from before, {seconds:.0f} s"
    text += "" if last else f", at most about {left:.0f} s to go"
    print(text, end="\r" if terminal and not last else "\n", file=sys.stderr, flush=True)


def _print(row: Row, used: Resources, limit: int) -> None:
    tile = f"{row.launch.rows}x{row.launch.columns}"
    arch = f"sm_{row.target}" if isinstance(row.target, int) else row.target
    kernel = f"{row.kernel}, TMA" if row.launch.hopper else row.kernel
    verdict = used.error or ("ok" if row.fits(used, limit) else "does not fit")
    print(f"{arch:<7}{row.dtype:<10}{row.head_dim:>4} {kernel:<14}{tile:>8}{row.launch.warps:>6}"
          f"{row.launch.stages:>7}{used.registers:>6}{used.spills:>7}{used.shared:>9}{limit:>9}  {verdict}",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
