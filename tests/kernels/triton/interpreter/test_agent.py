"""Agent attention's kernels in Triton's interpreter against two softmaxes in float64, forward and gradients."""

import pytest
import torch

from visattn import Layout, attention
from visattn.kernels.agent.attention import through_agents
from visattn.kernels.triton.agent.attention import agent_attention
from visattn.problem import Support


def formula(q, agents, k, v, mask, scale, there=None):
    """All pairs, weights that are nan (no key, no agent) as 0."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", agents, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    gathered = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(), v)
    reads = torch.einsum("bihd,bjhd->bhij", q, agents) * scale
    if there is not None:
        reads = reads.masked_fill(~there[:, None, None], float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", reads.softmax(-1).nan_to_num(), gathered)


def fused(q, agents, k, v, mask, scale, there=None):
    return agent_attention(q, agents, k, v, mask, there, scale, through_agents)


def tensors(tokens, agents, heads=1, kv_heads=1, dim=16, batch=1, masked=False):
    made = torch.Generator().manual_seed(0)
    sizes = ((tokens, heads), (agents, heads), (tokens, kv_heads), (tokens, kv_heads))
    inputs = [torch.randn((batch, *s, dim), generator=made) for s in sizes]
    return inputs, torch.rand((batch, tokens), generator=made) > 0.4 if masked else None


def results(run, inputs, mask, scale, there):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves, mask, scale, there)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def compare(inputs, mask, scale=0.3, limit=1e-5, there=None):
    ours = results(fused, inputs, mask, scale, there)
    truth = results(formula, [t.double() for t in inputs], mask, scale, there)
    for name, a, b in zip(("out", "dq", "dagents", "dk", "dv"), ours, truth, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        error = (a.double() - b).norm() / b.norm().clamp(min=0.1)
        assert error < limit, f"{name} is off by {error:.1e}"
    return ours


@pytest.mark.parametrize(
    ("tokens", "agents", "special"),
    [
        (1, 1, {}),
        (37, 5, {"heads": 4, "kv_heads": 2, "batch": 2, "masked": True}),
        (100, 40, {"dim": 40}),
        (3, 70, {"dim": 8, "masked": True}),
        (130, 16, {"heads": 2, "kv_heads": 1, "dim": 24}),
    ],
)
def test_matches_the_formula(tokens, agents, special):
    compare(*tensors(tokens, agents, **special))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_any_scale(scale):
    compare(*tensors(50, 9, masked=True), scale)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, limit):
    inputs, mask = tensors(50, 9, masked=True)
    assert compare([t.to(dtype) for t in inputs], mask, limit=limit)[0].dtype == dtype


def test_samples_without_keys_give_zeros():
    inputs, _ = tensors(40, 6, batch=2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        out = fused(*inputs, mask, 0.3)
    torch.testing.assert_close(out.double(), formula(*(t.double() for t in inputs), mask, 0.3), rtol=1e-5, atol=1e-6)
    assert (out[1] == 0).all() and (out[0] != 0).any()


def test_agents_that_do_not_exist_are_not_read():
    inputs, mask = tensors(40, 70, batch=3, masked=True)
    there = torch.rand(3, 70, generator=torch.Generator().manual_seed(2)) > 0.5
    there[0, :32], there[2] = False, False
    out, *_ = compare(inputs, mask, there=there)
    assert (out[2] == 0).all() and (out[:2] != 0).any()


def test_a_split_without_keys_counts_nothing():
    inputs, _ = tensors(90, 6)
    mask = torch.zeros(1, 90, dtype=torch.bool)
    mask[:, 61:64] = True
    compare(inputs, mask)


@pytest.mark.parametrize("how", ["heads first", "packed", "odd strides", "channels not contiguous"])
def test_inputs_are_read_where_they_lie(how):
    (q, agents, k, v), _ = tensors(21, 5, heads=2, kv_heads=2)
    if how == "heads first":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    elif how == "packed":
        views = list(torch.stack((q, k, v), 2).unbind(2))
    elif how == "odd strides":
        views = [torch.cat([t, t[..., :3]], 3)[..., :-3] for t in (q, k, v)]
    else:
        views = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert not any(t.is_contiguous() for t in views)
    torch.testing.assert_close(fused(views[0], agents, *views[1:], None, 0.3), fused(q, agents, k, v, None, 0.3))


def test_same_bits_twice():
    inputs, mask = tensors(77, 9, heads=2, kv_heads=1, masked=True)
    first, second = (fused(*inputs, mask, 0.3) for _ in range(2))
    assert torch.equal(first, second)


def test_no_samples():
    inputs, _ = tensors(8, 4)
    assert fused(*(t[:0] for t in inputs), None, 0.3).shape == (0, 8, 1, 16)


def test_the_backend_takes_the_kernels_where_they_pay(monkeypatch):
    """Never in the interpreter, which is for tests; on a GPU for masked keys without gradients."""

    def refuse(*_):
        raise AssertionError("the kernels ran")

    monkeypatch.setattr("visattn.kernels.triton.agent.attention.agent_attention", refuse)
    q, mask = torch.randn(1, 20, 1, 16), torch.ones(1, 20, dtype=torch.bool)

    def run(key_mask):
        return attention(q, q, q, "agent(agents=2x2)", Layout((4, 5)), key_mask=key_mask, backend="agent")

    with torch.no_grad():
        assert run(mask).shape == q.shape
    monkeypatch.setattr("visattn.kernels.agent.attention.on_gpu", lambda _: Support(True))
    assert run(mask).shape == q.shape, "with gradients torch is faster"
    with torch.no_grad():
        assert run(None).shape == q.shape, "and without a mask"
        with pytest.raises(AssertionError, match="the kernels ran"):
            run(mask)
