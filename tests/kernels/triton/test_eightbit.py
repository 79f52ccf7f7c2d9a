"""The kernels of 8 bits compiled ahead of time: registers, spills, shared memory."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from visattn import Layout, parse
from visattn.kernels.triton import ahead
from visattn.kernels.triton.arguments import Operands, Work
from visattn.kernels.triton.config import DIRECTIONS, EIGHT, EIGHT_HOPPER, SHARED_MEMORY
from visattn.kernels.triton.eightbit import launch
from visattn.kernels.triton.eightbit.run import eight_config
from visattn.kernels.triton.start import Starts


@pytest.mark.parametrize(
    ("arch", "config", "fp8", "dim", "text"),
    [
        (90, EIGHT_HOPPER[128], False, 128, "na(window=24x24)"),
        (90, EIGHT_HOPPER[128], True, 128, "na(window=24x24)"),
        (90, EIGHT_HOPPER[64], True, 64, "na(window=24x24)"),
        # Its tiles have no masks: another order of the groups.
        (90, EIGHT_HOPPER[128], False, 128, "dense"),
        (90, EIGHT_HOPPER[128], True, 128, "dense"),
        (80, EIGHT["ampere"][128], False, 128, "na(window=24x24)"),
    ],
)
def test_compiles_without_spills(monkeypatch, arch, config, fp8, dim, text):
    made = {}

    def compile_only(kernel, grid, given, warps, stages, copied=()):
        if not kernel.fn.__name__.startswith("attend"):
            return
        options = {"num_warps": warps, "enable_fp_fusion": True} | ({} if stages is None else {"num_stages": stages})
        binary = triton.compile(ahead.source(kernel, given), target=GPUTarget("cuda", arch, 32), options=options)
        made[kernel.fn.__name__] = ahead._used(binary, True)

    monkeypatch.setattr(launch, "launch_like", compile_only)
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: device)
    pattern, layout = parse(text), Layout((48, 48), 16)
    q = torch.empty(1, layout.length, 24, dim, dtype=torch.bfloat16)
    work = Work(pattern, layout, 0.1, False, dict.fromkeys(DIRECTIONS, config), Starts(q.device))
    taken = torch.zeros(1, dtype=torch.int32)
    t = Operands(q, q, q, out=torch.empty_like(q), lse=torch.empty(1, 24, layout.length), taken=taken)
    launch.forward(t, work, fp8)
    assert made["attend_8bit"].fits(SHARED_MEMORY[arch]), made


@pytest.mark.parametrize(("dim", "own"), [(64, True), (128, True), (40, False), (72, False), (96, False)])
def test_hoppers_own_kernel_takes_two_head_dims(dim, own):
    pattern, layout = parse("na(window=16x16,stride=8x8)"), Layout((64, 64))
    config = eight_config(90, torch.bfloat16, dim, pattern, layout, False)
    assert config is (EIGHT_HOPPER[dim] if own else EIGHT["large"][64 if dim <= 64 else 128])
    assert not eight_config(90, torch.bfloat16, dim, pattern, layout, True).hopper
