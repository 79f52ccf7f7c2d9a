"""Compiled training on the kernels: the backward starts from what the forward kept, and does not run it again."""

import pytest
import torch

from visattn import Layout, attention
from visattn.kernels.triton.prepared import Kernels

# Pattern, layout, whether keys are masked, whether the log-sum-exp is asked for.
CASES = {
    "window, mask": ("na(window=3x3)", Layout((4, 4), 2, 1), True, False),
    "log-sum-exp": ("na(window=3x3)", Layout((4, 4)), False, True),
    "routed": ("routing(regions=2x2,topk=2)", Layout((4, 4)), False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_forward_runs_once_and_gradients_have_eager_s_bits(name, monkeypatch):
    pattern, layout, masked, return_lse = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(1, layout.length, 2, 16, requires_grad=True) for _ in range(3)]
    mask = torch.arange(layout.length)[None] % 5 > 0 if masked else None

    def step(q, k, v):
        found = attention(q, k, v, pattern, layout, key_mask=mask, backend="triton", return_lse=return_lse)
        return (found[0] * 2).sum() + found[1].square().sum() if return_lse else (found * 2).square().sum()

    wanted = torch.autograd.grad(step(*inputs), inputs)
    seen = []
    forward = Kernels.forward
    monkeypatch.setattr(Kernels, "forward", lambda self, *given: seen.append(given) or forward(self, *given))
    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        seen.clear()
        found = torch.autograd.grad(run(*inputs), inputs)
        assert len(seen) == 1
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_bias_runs_it_again():
    layout = Layout((4, 4))
    inputs = [torch.randn(1, layout.length, 2, 16, requires_grad=True) for _ in range(3)]
    rpb = torch.randn(2, 5, 5, requires_grad=True)

    def step(q, k, v, rpb):
        return attention(q, k, v, "na(window=3x3)", layout, rpb=rpb, backend="triton").square().sum()

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(run(*inputs, rpb), [*inputs, rpb])
    for a, b in zip(found, torch.autograd.grad(step(*inputs, rpb), [*inputs, rpb]), strict=True):
        assert torch.equal(a, b)
