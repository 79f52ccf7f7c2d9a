"""Under autocast every engine does what it does outside with inputs that were cast as SDPA casts them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.cases import qkv
from visattn import Layout, attention

LAYOUT = Layout((5, 6), 1)
CALLS = [
    *(("na(window=3)", backend) for backend in ("tiles", "sdpa", "reference")),
    ("clear(radius=2, pool=2)", "auto"),
    ("routing(regions=2, topk=2)", "tiles"),
    *(
        (text, "auto")
        for text in ("agent(agents=2)", "linear", "linear(feature=exp)", "flow", "mala", "wersa(features=8)")
    ),
    ("sparselinear(sparse=na(window=3))", "auto"),
    *((f"{outer}(na(window=3))", "auto") for outer in ("sigmoid", "clipped", "gated", "selective")),
    ("linear(causal=1x0, decay=0.5)", "auto"),
]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def results(inputs, text, backend, parameters, lse):
    found = attention(*inputs, text, LAYOUT, backend=backend, parameters=parameters, return_lse=lse)
    return list(found) if lse else [found]


@pytest.mark.parametrize(("text", "backend"), CALLS)
def test_the_same_bits_as_with_cast_inputs(text, backend):
    inputs = qkv(LAYOUT, heads=2, kv_heads=1, dim=8, dtype=torch.float32)
    parameters = {"mix": torch.rand(2)} if text.startswith("sparselinear") else {}
    lse = backend != "auto" or text.startswith("clear")
    outside = results([t.bfloat16() for t in inputs], text, backend, parameters, lse)
    with autocast():
        inside = results(inputs, text, backend, parameters, lse)
    assert inside[0].dtype == torch.bfloat16
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_mixed_dtypes_and_gradients(run):
    q, k, v = (t.requires_grad_() for t in qkv(LAYOUT, dim=8, dtype=torch.float32))

    def step(q, k, v):
        return attention(q, k, v.bfloat16(), "na(window=3)", LAYOUT, backend="tiles")

    torch._dynamo.reset()
    call = torch.compile(step, backend="aot_eager", fullgraph=True) if run == "compiled" else step
    with autocast():
        out = call(q, k, v)
        torch_out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v.bfloat16())))
    assert out.dtype == torch_out.dtype == torch.bfloat16
    ours = torch.autograd.grad(out.float().sum(), (q, k, v))
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(attention(*low, "na(window=3)", LAYOUT, backend="tiles").float().sum(), low)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_double_precision_stays():
    inputs = qkv(LAYOUT, dim=8)
    with autocast():
        out = attention(*inputs, "na(window=3)", LAYOUT)
    assert torch.equal(out, attention(*inputs, "na(window=3)", LAYOUT))
