"""The Triton backend where there is no GPU."""

import os
import subprocess
import sys
import types

import pytest
import torch

from visattn import Layout, attention, backends
from visattn.crossing import crossing
from visattn.dispatch import choose, load
from visattn.kernels.triton import backend
from visattn.patterns import parse
from visattn.problem import Problem

pytest.importorskip("triton")


def test_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "there is no CUDA device" in backends()["triton"].reason
    q = torch.randn(1, 20, 1, 16)
    with pytest.raises(ValueError, match="there is no CUDA device"):
        attention(q, q, q, "na(window=3x3)", Layout((4, 5)), backend="triton")


def test_listing_backends_does_not_import_triton():
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "import sys; from visattn.dispatch import load; load('triton').available(); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=plain, check=True)


def test_who_runs_a_call_is_decided_for_the_gpu_that_is_the_current_one(monkeypatch):
    current, gpus = 0, [(9, 0), (7, 5)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpus[device])
    memory = types.SimpleNamespace(shared_memory_per_block_optin=2**18)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: memory)
    keeping = (backend._architecture, backend._device_support, backend._on_gpu)
    for kept in keeping:
        kept.cache_clear()
    q = types.SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(1, 1024, 8, 64))
    problem = Problem(parse("na(window=5)"), Layout((32, 32)), 1, 8, 8, 64, torch.float16, "cuda")
    try:
        assert backend.architecture() == 90 and choose(problem, "triton").name == "triton"
        assert backend.on_gpu(q).ok and crossing(problem).backend == "triton"
        current = 1
        assert backend.architecture() == 75 == backend.architecture(torch.device("cuda"))
        with pytest.raises(ValueError, match=r"compute capability 7\.5 is below 8\.0"):
            choose(problem, "triton")
        assert "capability 7.5" in backend.on_gpu(q).reason and crossing(problem).backend != "triton"
        assert backend.architecture(torch.device("cuda", 0)) == 90
    finally:
        for kept in keeping:
            kept.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("na(window=7x7)", Layout((20, 23), 7, 77)),
        ("na(window=16x16,stride=8x8)", Layout((48, 48))),
        ("radial(decay=0.5)", Layout((8, 16, 16))),
    ],
)
def test_on_a_gpu(pattern, layout, dtype):
    q, k, v = (torch.randn(2, layout.length, 3, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    found = []
    for name in ("triton", "reference"):
        out = attention(q, k, v, pattern, layout, backend=name)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        assert (a - b).float().norm() < (1e-4 if dtype == torch.float32 else 2e-2) * b.float().norm()


def test_loads_by_name():
    assert load("triton").name == "triton"
