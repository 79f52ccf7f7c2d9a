"""Second branches by kernels, in Triton's interpreter, against torch's operators."""

import pytest
import torch

from tests.support.cases import gradients, qkv
from visattn import Layout, attention, parse
from visattn.kernels.hybrid import backend
from visattn.kernels.triton.choosing import choose
from visattn.kernels.triton.hybrid import run
from visattn.kernels.triton.hybrid.router import routed
from visattn.patterns.choice.blocks import inner
from visattn.problem import Support

CASES = [
    ("sla(keep=0.3, block=2x3)", Layout((7, 11), 3, 1), 2, False, 24, torch.float16),
    ("sla(keep=2, marginal=3, feature=elu, block=4x4)", Layout((9, 6), 1), 2, True, 16, torch.float32),
    ("sla(keep=2, feature=relu, block=4)", Layout(70), 1, True, 20, torch.float32),
    ("sla2(keep=3, block=4x4)", Layout((9, 7), 2), 1, True, 16, torch.float16),
    ("sla2(keep=3, block=12x8, key_block=4x4, ratio=mass, router=mean)", Layout((13, 9)), 2, False, 33, torch.float32),
    ("vsa(keep=3, block=4x4)", Layout((9, 7), 2, 2), 1, True, 16, torch.float32),
    ("vsa(keep=2, gate=channel, block=9)", Layout(40), 2, False, 24, torch.float16),
]


@pytest.mark.parametrize(("text", "layout", "kv_heads", "masked", "dim", "dtype"), CASES)
def test_equals_torch(text, layout, kv_heads, masked, dim, dtype):
    pattern = parse(text)
    assert run.runs(pattern, dtype, dim)
    q, k, v = qkv(layout, 2, kv_heads, dim, batch=2, dtype=dtype)
    mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    made = torch.Generator().manual_seed(1)
    shapes = pattern.parameter_shapes(2, dim, layout.grid)
    parameters = {n: torch.randn(s, generator=made) * dim**-0.5 for n, s in shapes.items()}
    # Lists are those of the tensors as they are.
    choice = pattern.choose(q, k, layout, mask, 0.3, parameters) if pattern.needs_choice else None
    soft = torch.randn(q.shape, generator=made).to(dtype)
    at = inner(layout)
    wide = [x.double() for x in (soft[:, at], q, k, v)]
    expected = pattern.join(*wide, layout, mask, 0.3, choice, {n: p.double() for n, p in parameters.items()})
    out = soft.clone()
    run.join(pattern, out, q, k, v, layout, mask, 0.3, choice, parameters)
    limit = 2e-5 if dtype == torch.float32 else 3e-3
    assert (out[:, at].double() - expected).abs().max() < limit * expected.abs().max()
    out[:, at] = soft[:, at]
    assert torch.equal(out, soft)


@pytest.mark.parametrize(
    ("text", "layout", "masked"),
    [
        ("sla2(keep=3, block=4x4, key_block=2x4, always=self)", Layout((9, 7), 2), True),
        ("sla2(keep=0.3, block=4, router=mean)", Layout(22), False),
        ("sla2(keep=1.0, block=4x4)", Layout((7, 5)), False),
    ],
)
def test_the_router_by_kernels(text, layout, masked, monkeypatch):
    monkeypatch.setattr(choose, "SCORES", 200)
    pattern = parse(text)
    q, k, v = (x.mul(64).round() / 64 for x in qkv(layout, 4, 2, 16, batch=2, dtype=torch.float32))
    mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    made = torch.Generator().manual_seed(1)
    shapes = pattern.parameter_shapes(4, 16, layout.grid)
    parameters = {n: torch.randn(s, generator=made) / 4 for n, s in shapes.items()}
    given = q, k, layout, mask, 0.25, parameters
    found, blocks = routed(pattern, q, k, v, *given[2:]), pattern.blocks(layout.grid)
    choice, (scores, seen) = pattern.choose(*given), pattern.router_scores(*given)
    listed = found.choice.mask(0, blocks.columns)
    assert torch.equal(listed, choice.mask(0, blocks.columns))
    odds = pattern.odds(scores, seen, listed.to(scores.dtype), layout, mask)
    for others in found.others[:2]:
        assert torch.equal(others.view(listed.shape), (~listed).float())
    exact, finite = found.odds
    assert torch.equal(finite, exact.masked_fill(exact.isinf(), 0))
    torch.testing.assert_close(exact, odds, atol=1e-4, rtol=1e-4)


def test_what_kernels_have_not():
    assert not run.runs(parse("sla2(soft=0.1)"), torch.float32, 64)
    assert not run.runs(parse("sla"), torch.float64, 64)
    assert not run.runs(parse("vsa"), torch.bfloat16, 256)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_marginal_blocks_by_kernels(dtype, masked):
    pattern, layout = parse("sla(keep=2, marginal=3, block=4x4, always=self)"), Layout((9, 11), 2)
    q, k, v = (x.mul(4).round().clamp(-8, 8).to(dtype) for x in qkv(layout, 4, 2, 16, batch=2, dtype=torch.float32))
    mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    found = routed(pattern, q, k, v, layout, mask, 0.25, {})
    choice = pattern.choose(q, k, layout, mask, 0.25, {})
    assert torch.equal(found.choice.tiles, choice.tiles)
    of = pattern.marginal_blocks(q, k, layout, mask, 0.25, choice)
    assert found.others.narrow.dtype == dtype and of.any() and not of.all()
    for others in found.others[:2]:
        assert torch.equal(others.view(of.shape) != 0, of) and others.max() == 1


@pytest.mark.parametrize(
    "text",
    [
        "sla(keep=2, block=4x4)",
        "sla(keep=2, marginal=1, block=4x4)",
        "sla2(keep=2, block=4x4)",
        "vsa(keep=2, block=4x4)",
    ],
)
def test_whole_calls_take_the_kernels(text, monkeypatch):
    pattern, layout = parse(text), Layout((7, 9), 2)
    q, k, v = qkv(layout, 2, 1, 16, dtype=torch.float32)
    made = torch.Generator().manual_seed(1)
    shapes = pattern.parameter_shapes(2, 16, layout.grid)
    given = {n: torch.randn(s, generator=made) / 4 for n, s in shapes.items()}
    expected = attention(q, k, v, pattern, layout, parameters=given)
    monkeypatch.setattr(backend, "on_gpu", lambda q: Support(True))
    joined = []
    monkeypatch.setattr(run, "join", lambda *all, join=run.join: (joined.append(all[0]), join(*all)))
    torch.testing.assert_close(attention(q, k, v, pattern, layout, parameters=given), expected, atol=1e-4, rtol=1e-4)
    assert joined == [pattern]
    # Gradients take the kernels of linear attention, or torch's operators.
    learned = [*(x.requires_grad_() for x in (q, k, v)), *(p.requires_grad_() for p in given.values())]
    found = gradients(attention(q, k, v, pattern, layout, parameters=given), learned)
    assert joined == [pattern]
    monkeypatch.setattr(backend, "on_gpu", lambda q: Support(False))
    wanted = gradients(attention(q, k, v, pattern, layout, parameters=given), learned)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
