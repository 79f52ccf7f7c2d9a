"""Compiling a kernel ahead of time, without a GPU, and what it then needs."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from visattn.files import write_json
from visattn.kernels.triton.config import DIRECTIONS, Config
from visattn.layout import Layout
from visattn.patterns import Neighborhood


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: Per thread.
        spills: Bytes of stack per thread, where spilled registers go.
        shared: Bytes of shared memory per program.
        error: Why it did not compile, empty if it did.
        kept: Whether an earlier compilation of the same found it out.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""
    kept: bool = False

    def fits(self, limit: int, spare: int = 0) -> bool:
        """Whether it compiled, spills at most `spare` or `stray()` bytes and fits in `limit` bytes of shared memory."""
        return not self.error and self.spills <= max(spare, stray()) and self.shared <= limit


def stray() -> int:
    """Bytes that any kernel may spill: none, but 64 where the compiler is older than the one that they were written by.

    Triton 3.6, which torch 2.11 brings, spills 8 to 64 bytes in a dozen kernels that have all of the 255 registers or
    sum many rows. The times of `docs/results` on an H200 are of those.
    """
    import triton

    return 64 if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8) else 0


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
    from visattn.kernels.triton.hopper import query_grad as hopper_query_grad
    from visattn.kernels.triton.hopper.launch import hopper_arguments, key_arguments, query_arguments
    from visattn.kernels.triton.lists.forward import attend
    from visattn.kernels.triton.lists.key_grad import key_gradients
    from visattn.kernels.triton.lists.query_grad import query_gradients
    from visattn.kernels.triton.start import Starts

    pattern, layout = Neighborhood((24, 24)), Layout((48, 48), prefix=16)
    # A 24-head model: strides and offsets are as well aligned as they are in practice.
    q, k, v = (torch.empty(1, layout.length, 24, head_dim, dtype=dtype, device="meta") for _ in range(3))
    sides = pattern.rpb_shape(layout.grid)
    work = arguments.Work(pattern, layout, 0.125, False, dict.fromkeys(DIRECTIONS, launch), Starts(q.device))
    lse = torch.empty(1, 24, layout.length, device="meta")
    given = arguments.Operands(q, k, v, out=torch.empty_like(q), lse=lse, delta=lse, grad_out=torch.empty_like(q))
    given.grad_q, given.grad_k, given.grad_v = q, k, v
    given.taken = torch.empty(1, dtype=torch.int32, device="meta")
    if bias:
        given.rpb = torch.empty(24, sides[0] * sides[1], device="meta")
        given.key_mask = torch.empty(1, layout.length, dtype=torch.uint8, device="meta")
    if launch.hopper and direction == "key_grad":
        return hopper_key_grad.key_gradients, key_arguments(given, work) | given.given("grad_k", "grad_v")
    if launch.hopper and direction == "query_grad":
        return hopper_query_grad.query_gradients, query_arguments(given, work) | given.given("grad_q")
    if launch.hopper:
        return hopper.attend, hopper_arguments(given, work)
    if direction == "forward":
        return attend, arguments.forward_arguments(given, work)
    kernel = key_gradients if direction == "key_grad" else query_gradients
    return kernel, arguments.gradient_arguments(direction, given, work)


def source(kernel: Any, given: dict[str, Any]) -> Any:
    """What triton.compile takes, specialised as a launch with these arguments would be."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names |= {torch.int32: "*i32", torch.int64: "*i64", torch.int16: "*i16", torch.uint8: "*u8", torch.int8: "*i8"}
    names[torch.float8_e4m3fn] = "*fp8e4nv"
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
    target: str | int,
    direction: str,
    dtype: torch.dtype,
    head_dim: int,
    launch: Config,
    bias: bool = False,
    folder: Path | None = None,
) -> Resources:
    """Compile one kernel, or look up what it needed when the same was compiled before.

    Args:
        target: Compute capability times ten, or the name of an AMD architecture.
        direction: Name of the kernel.
        dtype: Of its inputs.
        head_dim: Channels per head.
        launch: Its configuration.
        bias: Whether to compile the variant with key mask and bias.
        folder: Where results are kept; None keeps none.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    asked = source(*kernel_arguments(direction, dtype, head_dim, launch, bias))
    file = None if folder is None else folder / f"{_fingerprint(asked, gpu, options)}.json"
    found = None if file is None else _kept(file)
    if found is not None:
        return found
    try:
        binary = triton.compile(asked, target=gpu, options=options)
    except Exception as error:
        # Not kept: what is missing here may be installed the next time.
        return Resources(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    used = _used(binary, isinstance(target, int))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, [used.registers, used.spills, used.shared], indent=None)
    return used


def _fingerprint(asked: Any, gpu: Any, options: dict[str, Any]) -> str:
    """A hash of everything that a compilation depends on.

    That is the kernel's source with all functions it calls, types, constants and alignment of its arguments, target and
    options, and the versions of Triton and of its assembler.
    """
    import triton
    from triton.compiler import make_backend

    parts = asked.hash(), gpu, sorted(options.items()), triton.__version__, make_backend(gpu).hash()
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kept(file: Path) -> Resources | None:
    """What an earlier compilation found, None if there was none."""
    try:
        registers, spills, shared = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return Resources(registers, spills, shared, kept=True)


def _used(binary: Any, cuda: bool) -> Resources:
    """What Triton's result needs."""
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
