"""The kernels of 8 bits in Triton's interpreter, against the float64 oracle along the same lists."""

import pytest
import torch

from tests.support import eightbit as oracle
from visattn import Layout, attention, dense_mask, parse
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.config import EIGHT
from visattn.kernels.triton.eightbit import quantise
from visattn.kernels.triton.lists.program import program

CONFIG = EIGHT["interpreter"][128]
# The interpreter cuts floats to e4m3 where hardware rounds: twice the error, and too little.
LIMIT = {"int8": 2e-3, "fp8": 0.12}


def tensors(layout, heads, kv_heads, dim):
    made = torch.Generator().manual_seed(0)

    def normal(length, heads):
        return torch.randn(1, length, heads, dim, generator=made)

    q, k, v = normal(layout.length, heads), normal(layout.length, kv_heads), normal(layout.length, kv_heads)
    return q, k + 2 * normal(1, kv_heads), v + 2 * normal(1, kv_heads)


@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize(
    ("pattern", "layout", "kv_heads", "dim"),
    [
        ("na(window=5x5)", Layout((9, 11), 3, 40), 1, 32),
        ("na(window=4x8,stride=4x8)", Layout((8, 16)), 2, 40),
        ("na(window=3x3,dilation=2)", Layout((7, 9)), 2, 32),
        ("dense", Layout(70), 1, 64),
    ],
)
def test_forward(pattern, layout, kv_heads, dim, precision):
    q, k, v = tensors(layout, 2, kv_heads, dim)
    out, lse = attention(q, k, v, pattern, layout, precision=precision, backend="triton", return_lse=True)
    run = program(plan_of(parse(pattern), layout, "forward", CONFIG), False, CONFIG.per_step, q.device)
    steps = oracle.steps_of_program(run, dense_mask(parse(pattern), layout))
    # The mean is that of the first of four blocks of 64 keys.
    given = (t[0].double() for t in (q, k, v))
    truth, sums = oracle.attend(*given, steps, dim**-0.5, precision, range(min(64, layout.length)))
    assert float((out[0] - truth).norm() / (truth - truth.mean(0)).norm()) < LIMIT[precision]
    assert float((lse[0] - sums).abs().max()) < (1e-3 if precision == "int8" else 0.05)


@pytest.mark.parametrize(
    "pattern", ["topk(keep=0.5,block=4x4)", "routing(regions=2x2,topk=2)", "clear(radius=3,pool=2)"]
)
def test_masked_routed_and_pooled(pattern):
    layout = Layout((8, 8), 3)
    q, k, v = tensors(layout, 2, 1, 32)
    mask = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(1)) > 0.4
    given = {"key_mask": mask, "return_lse": True}
    truth, sums = attention(q, k, v, pattern, layout, **given, backend="reference")
    out, lse = attention(q, k, v, pattern, layout, **given, precision="int8", backend="triton")
    assert float((out - truth).norm() / (truth - truth.mean(1, keepdim=True)).norm()) < 0.03
    assert float((lse - sums).abs().max()) < 0.05
    # What is hidden moves no scale and no mean.
    wild = (t.masked_fill(~mask[..., None, None], value) for t, value in ((k, -3e4), (v, 1e4)))
    assert out.equal(attention(q, *wild, pattern, layout, key_mask=mask, precision="int8", backend="triton"))
    nothing = torch.zeros_like(mask)
    out = attention(q, k, v, pattern, layout, key_mask=nothing, precision="int8", backend="triton")
    assert not out.any()


def test_negative_scale():
    layout = Layout((6, 7))
    q, k, v = tensors(layout, 1, 1, 32)
    given = {"scale": -0.2, "precision": "int8", "backend": "triton"}
    mirrored = attention(-q, k, v, "na(window=3x3)", layout, **(given | {"scale": 0.2}))
    assert attention(q, k, v, "na(window=3x3)", layout, **given).equal(mirrored)


def test_statistics_of_a_long_sequence():
    made = torch.Generator().manual_seed(0)
    length, chunk, dim = 700, 512, 32
    k, v = (torch.randn(1, length, 1, dim, generator=made) for _ in range(2))
    found = torch.empty(1, 2, 4, dim)
    numbers = {"heads": 1, "length": length, "chunk": chunk, "chunks": 2, "block": 64, "every": 4}
    strides = {f"{x}_{axis}": n for x in "kv" for axis, n in (("batch", length * dim), ("token", dim), ("head", dim))}
    constants = {"HEAD_DIM": dim, "BLOCK_DIM": dim, "ROWS": 16, "UNIT": 1}
    quantise.column_statistics[(2, 1)](k=k, v=v, found=found, **numbers, **strides, **constants)
    for part, own in enumerate((range(chunk), range(chunk, length))):
        added = [t for t in own if t // 64 % 4 == 0]
        values = v[0, list(own), 0]
        right = torch.stack([k[0, added, 0].sum(0), values.amin(0), values.amax(0), values.sum(0)])
        torch.testing.assert_close(found[0, part], right, atol=1e-4, rtol=1e-5)
