"""Compile every shipped configuration for every architecture, without a GPU, and print what it needs.

    python -m visattn.kernels.triton.resources [--arch 80 90] [--dtype bfloat16] [--head-dim 64 128] [--kernel forward]

A row per architecture, dtype, head dim and kernel: registers per thread, spilled bytes per thread, shared memory per
program. Exit status 1 if one spills, needs more shared memory than the architecture has, or does not compile. `--bias`
compiles the variants with key mask and, where there is one, relative position bias. `--hip` adds AMD, as far as the
compiler goes; that never changes the exit status. `--jobs` compiles in that many processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from visattn.kernels.triton.config import DIRECTIONS, HOPPER, SHARED_MEMORY, Config, config, largest_head_dim
from visattn.layout import Layout
from visattn.patterns import Neighborhood

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
# Bytes that the Hopper kernels may spill: numbers that are written before the loops, and read between them, in branches
# that a row tile takes once, or by the warps that copy and deal.
HOPPER_SPILLS = 64
# Bytes of a work-group's local memory on CDNA 3 (AMD CDNA 3 white paper).
AMD_MEMORY = 64 * 1024


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: Per thread.
        spills: Bytes of stack per thread, where spilled registers go.
        shared: Bytes of shared memory per program.
        error: Why it did not compile, empty if it did.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""

    def fits(self, limit: int, spare: int = 0) -> bool:
        """Whether it compiled, spills at most `spare` bytes and fits in `limit` bytes of shared memory."""
        return not self.error and self.spills <= spare and self.shared <= limit


def kernel_arguments(name: str, dtype: torch.dtype, head_dim: int, launch: Config, bias: bool) -> Any:
    """A kernel and its arguments for a small joint text and image problem."""
    if name not in DIRECTIONS:
        from visattn.kernels.triton import products

        return products.cases(dtype, head_dim, bias)[name]()[:2]
    return list_arguments(name, dtype, head_dim, launch, bias)


def list_arguments(direction: str, dtype: torch.dtype, head_dim: int, launch: Config, bias: bool) -> Any:
    """The same of a kernel along tile lists."""
    from visattn.kernels.triton import arguments
    from visattn.kernels.triton.hopper import forward as hopper
    from visattn.kernels.triton.hopper import key_grad as hopper_key_grad
    from visattn.kernels.triton.hopper.launch import hopper_arguments, key_arguments
    from visattn.kernels.triton.lists.forward import attend
    from visattn.kernels.triton.lists.key_grad import key_gradients
    from visattn.kernels.triton.lists.query_grad import query_gradients
    from visattn.kernels.triton.start import Starts

    pattern, layout = Neighborhood((24, 24)), Layout((48, 48), prefix=16)
    # A 24-head model: strides and offsets are as well aligned as they are in practice.
    q, k, v = (torch.empty(1, layout.length, 24, head_dim, dtype=dtype, device="meta") for _ in range(3))
    sides = pattern.rpb_shape(layout.grid)
    rpb = torch.empty(24, sides[0] * sides[1], device="meta") if bias else None
    mask = torch.empty(1, layout.length, dtype=torch.uint8, device="meta") if bias else None
    work = arguments.Work(pattern, layout, 0.125, mask, False, dict.fromkeys(DIRECTIONS, launch), Starts(q.device))
    lse = torch.empty(1, 24, layout.length, device="meta")
    if launch.hopper and direction == "key_grad":
        return hopper_key_grad.key_gradients, key_arguments(q, k, v, q, lse, lse, work) | {"grad_k": k, "grad_v": v}
    if launch.hopper:
        return hopper.attend, hopper_arguments(q, k, v, torch.empty_like(q), lse, work)
    if direction == "forward":
        return attend, arguments.forward_arguments(q, k, v, rpb, torch.empty_like(q), lse, work)
    given = arguments.gradient_arguments(direction, q, k, v, rpb, torch.empty_like(q), lse, lse, work)
    if direction == "key_grad":
        return key_gradients, given | {"grad_k": q, "grad_v": q}
    return query_gradients, given | {"grad_q": q}


def source(kernel: Any, given: dict[str, Any]) -> Any:
    """What triton.compile takes, specialised as a launch with these arguments would be."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names |= {torch.int32: "*i32", torch.uint8: "*u8"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, index = given[parameter.name], (i,)
        if hasattr(value, "block_shape"):
            box = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{names[value.base.dtype][1:]}[{box}],{value.layout!r}>"
        elif parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[index] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = names[value.dtype]
            attributes[index] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index] = [["tt.divisibility", 16]]
    return (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)


def compiled(
    target: str | int, direction: str, dtype: torch.dtype, head_dim: int, launch: Config, bias: bool = False
) -> Resources:
    """Compile one kernel for an architecture: compute capability times ten, or a name of AMD's."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, given = kernel_arguments(direction, dtype, head_dim, launch, bias)
    cuda = isinstance(target, int)
    gpu = GPUTarget("cuda", target, 32) if cuda else GPUTarget("hip", target, 64)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    try:
        binary = triton.compile(source(kernel, given), target=gpu, options=options)
    except Exception as error:
        return Resources(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    if cuda:
        return Resources(*_usage(binary.asm["cubin"]), shared=binary.metadata.shared)
    text = binary.asm["amdgcn"]
    registers, spills = (_field(text, name) for name in (".vgpr_count", ".vgpr_spill_count"))
    return Resources(registers, 4 * spills, binary.metadata.shared)


def _field(text: str, name: str) -> int:
    found = re.search(re.escape(name) + r":\s*(\d+)", text)
    return int(found.group(1)) if found else 0


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found, text.stdout
    return int(found.group(1)), int(found.group(2))


@lru_cache(maxsize=1)
def _cuobjdump() -> str:
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


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

    def compile(self) -> Resources:
        """What it needs."""
        return compiled(self.target, self.kernel, DTYPES[self.dtype], self.head_dim, self.launch, self.bias)

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


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m visattn.kernels.triton.resources", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_MEMORY), choices=list(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--head-dim", type=int, nargs="*", default=list(HEAD_DIMS), choices=list(HEAD_DIMS))
    parser.add_argument("--kernel", nargs="*", default=list(kernel_names()), choices=list(kernel_names()))
    parser.add_argument("--bias", action="store_true", help="the variants with key mask and relative position bias")
    parser.add_argument("--hip", nargs="?", const="gfx942", help="also compile for AMD (informative)")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set, which compiles nothing: unset it", file=sys.stderr)
        return 2
    print(f"{'arch':<7}{'dtype':<10}{'D':>4} {'kernel':<14}{'tile':>8}{'warps':>6}{'stages':>7}"
          f"{'regs':>6}{'spill':>7}{'shared':>9}{'limit':>9}  verdict")  # fmt: skip
    targets = [*chosen.arch, *([chosen.hip] if chosen.hip else [])]
    todo = list(rows(targets, chosen.dtype, chosen.head_dim, chosen.kernel, chosen.bias))
    bad = 0
    with multiprocessing.Pool(chosen.jobs) if chosen.jobs > 1 else nullcontext() as pool:
        for row, used in zip(todo, (pool.imap if pool else map)(Row.compile, todo), strict=True):
            limit = SHARED_MEMORY[row.target] if isinstance(row.target, int) else AMD_MEMORY
            bad += isinstance(row.target, int) and not row.fits(used, limit)
            _print(row, used, limit)
    print(f"{bad} of the CUDA configurations do not fit" if bad else "every CUDA configuration fits")
    return int(bad > 0)


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
