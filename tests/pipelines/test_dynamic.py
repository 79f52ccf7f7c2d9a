"""Patterns that look at q and k, inside diffusers models: eager and compiled, and the density that the report tells."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

import torch._dynamo
from torch._dynamo.testing import CompileCounter

import visattn
from tests.support import tiny_models
from visattn.patterns import DynamicPattern, parse, routed_mask
from visattn.patterns.choice import listening


@pytest.mark.parametrize(
    "text", ["topk(keep=0.25, block=2x3)", "topp(p=0.7, block=2x3, rest=mean)", "above(tau=0.5, block=5)"]
)
def test_the_report_says_what_density_was_reached(text):
    model, inputs = tiny_models.flux(single=1)
    seen = []
    with visattn.apply(model, text, strict=True, backend="tiles") as handle:
        handle.watch(lambda call: seen.append(call))
        for _ in range(2):
            tiny_models.run(model, inputs)
        report = handle.report()
    assert report.sites_hit == len(report.modules) == 2
    for site in report.modules:
        (call,) = site.calls
        masks = [routed_mask(parse(text), c.layouts[0], c.q, c.k, None, c.scale) for c in seen if c.site == site.site]
        shares = torch.stack(masks).double().mean((3, 4))
        assert call.reached == pytest.approx((shares.mean().item(), shares.min().item(), shares.max().item()))
        assert call.density == call.reached.mean
    found = [site.calls[0].reached for site in report.modules]
    least, most = min(each.least for each in found), max(each.most for each in found)
    line = f"density {report.density:.3f} ({least:.3f} to {most:.3f} over heads and calls)"
    assert line in " ".join(str(report).split())
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["calls"][0]["reached"].keys() == {
        "mean",
        "least",
        "most",
    }


def test_a_fixed_pattern_has_no_density_that_was_reached():
    model, inputs = tiny_models.flux(single=1)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        tiny_models.run(model, inputs)
        report = handle.report()
        assert all(call.reached is None for site in report.modules for call in site.calls)
        assert report.choosing_seconds == 0 and "choosing" not in str(report)


@pytest.mark.parametrize(
    "text",
    [
        "topk(keep=0.25, block=2x3)",
        "topk(keep=1.0, block=2x3, skip=0.5)",
        "kmeans(queries=4, keys=6, p=0.5, floor=0.0, start=2)",
        "best(of=[topk(keep=0.3, block=2x3), na(window=3x3)])",
    ],
)
def test_the_report_says_what_choosing_took(text):
    model, inputs = tiny_models.flux(single=1)
    with visattn.apply(model, text, strict=True) as handle:
        for _ in range(3):
            tiny_models.run(model, inputs)
        report = handle.report()
    for site in report.modules:
        assert 0 < site.choosing_seconds < site.sparse_seconds
    assert report.choosing_seconds == report.to_dict()["choosing_seconds"] < report.sparse_seconds
    assert "of the time is choosing" in str(report)


def test_choosing_is_timed_in_steady_calls_and_no_choice_inside_another_twice(monkeypatch):
    import time

    model, inputs = tiny_models.flux(single=1)
    now = [0.0]
    monkeypatch.setattr("visattn.tally.time.perf_counter", lambda: now[0])

    def slow(self, *given):
        now[0] += 100 if len(calls) < 2 else 1
        calls.append(given)
        with listening.choosing():
            return self.chosen_by_torch(*given)

    calls = []
    assert time.perf_counter() == 0
    monkeypatch.setattr(DynamicPattern, "_chosen", slow)
    with visattn.apply(model, "topk(keep=0.25, block=2x3)", strict=True, backend="tiles") as handle:
        for _ in range(3):
            tiny_models.run(model, inputs)
        report = handle.report()
    # The first call of all takes long, as if it compiled; the next one, of the other module, is a steady one.
    assert len(calls) == 6 and report.choosing_seconds == report.sparse_seconds > 0
    assert report.choosing_seconds == (1 + 1 + 1) + (100 + 1 + 1)
    assert report.first_seconds == 100


def test_compiled_code_lists_what_eager_code_lists():
    model, inputs = tiny_models.flux(single=1)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with visattn.apply(model, "topp(p=0.6, block=2x3)", strict=True, backend="tiles") as handle:
        eager = tiny_models.run(model, inputs)
        reached = [call.reached for site in handle.report().modules for call in site.calls]
        torch.testing.assert_close(tiny_models.run(compiled, inputs), eager)
        again = [call.reached for site in handle.report().modules for call in site.calls]
    assert counter.frame_count == 1
    # The same lists, counted twice.
    torch.testing.assert_close(torch.tensor(again), torch.tensor(reached))
    torch._dynamo.reset()


def test_attention_is_one_operator_with_gradients():
    layout = visattn.Layout((6, 8), 2)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, layout.length, 4, 8).unbind(0))

    def run(q, k, v):
        return visattn.attention(q, k, v, "topk(keep=0.3, block=2x2, rest=mean)", layout)

    torch._dynamo.reset()
    counter = CompileCounter()
    out, compiled = run(q, k, v), torch.compile(run, backend=counter, fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, out)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (compiled, out)), strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
    torch._dynamo.reset()
