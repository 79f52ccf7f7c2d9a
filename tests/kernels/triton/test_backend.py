"""The Triton backend where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from visattn import Layout, attention, backends
from visattn.dispatch import load

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
