"""The caught share of attention that a report tells if it is asked to look."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_models
from visattn import Layout, dense_mask, parse
from visattn.caught import Caught
from visattn.kernels.caught import caught_mass
from visattn.patterns import DynamicPattern, routed_mask
from visattn.patterns.choice.stratified import sampled_rows
from visattn.watch import Watched


def exact(watched, layout, rows, mask):
    """Mass on a mask [B, H, S, S], by all products."""
    keys = watched.k.repeat_interleave(watched.q.shape[2] // watched.k.shape[2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", watched.q, keys).double() * watched.scale
    if watched.key_mask is not None:
        logits = logits.masked_fill(~watched.key_mask[:, None, None], -torch.inf)
    return (logits.softmax(-1) * mask).sum(-1)[:, :, rows]


@pytest.mark.parametrize(
    "text",
    [
        "topk(keep=0.3, block=2x2, rest=mean)",
        "topp(p=0.5, block=2x3, share=all)",
        "na(window=3x3)",
        "routing(regions=2, topk=1)",
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_mass_is_the_exact_attention_on_what_is_listed(text, masked):
    layout, pattern = Layout((4, 6), 2, 1), parse(text)
    q, k, v = torch.randn(3, 2, layout.length, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    k, v = k[:, :, :2], v[:, :, :2]
    valid = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    watched = Watched("a", q, k, v, q, pattern, (layout,), 0.3, valid, {})
    rows = sampled_rows(layout, 5, q.device)
    assert len(rows) == 5 and rows.min() >= 2 and rows.max() < 26
    if isinstance(pattern, DynamicPattern) or pattern.name == "routing":
        mask = routed_mask(pattern, layout, q, k, valid, 0.3)
        mask = mask if mask.ndim == 4 else mask[:, None]
    else:
        mask = dense_mask(pattern, layout)
    mass = exact(watched, layout, rows, mask)
    there = torch.ones(2, 1, 5) if valid is None else valid[:, rows][:, None]
    expected = (mass * there).sum(-1) / there.sum(-1).clamp(min=1)
    found = caught_mass(watched, layout, slice(None), 5)
    torch.testing.assert_close(found.double().expand(2, 4), expected.expand(2, 4), rtol=1e-4, atol=1e-5)


def test_other_patterns_have_a_mass_too():
    layout = Layout((4, 6), 2)
    q, k, v = torch.randn(3, 1, layout.length, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def mass(text, **parameters):
        watched = Watched("a", q, k, v, q, parse(text), (layout,), 0.3, None, parameters)
        return caught_mass(watched, layout, slice(None), 24)

    near, far = mass("na(window=3x3)"), mass("topk(keep=0.5, block=2x2)")
    heads = mass("perhead(heads={0: na(window=3x3)}, rest=topk(keep=0.5, block=2x2))")
    torch.testing.assert_close(heads, torch.stack([near.expand(1, 2)[:, 0], far[:, 1]], 1))
    best = mass("best(of=[na(window=3x3), topk(keep=0.5, block=2x2)])")
    assert ((best - near).abs() < 1e-6).logical_or((best - far).abs() < 1e-6).all()
    pattern = parse("kmeans(queries=3, keys=4, p=0.5, floor=0.0, start=2)")
    watched = Watched("a", q, k, v, q, pattern, (layout,), 0.3, None, {})
    groups = pattern.cluster(q, k, layout, None, 0.3)
    rows = sampled_rows(layout, 24, q.device)
    expected = exact(watched, layout, rows, pattern.token_mask(groups, layout)).mean(-1)
    torch.testing.assert_close(caught_mass(watched, layout, slice(None), 24).double(), expected, rtol=1e-4, atol=1e-5)
    assert mass("linear") is None and mass("topk(keep=1.0)") is None
    gate = parse("gate(by=topk(keep=0.5, block=2x2), dim=3)")
    weights = {n: torch.randn(s) for n, s in gate.parameter_shapes(2, 8, (4, 6)).items()}
    assert 0 < mass(str(gate), **weights).max() < 1


def test_the_report_says_what_is_caught_and_watchers_go_on():
    model, inputs = tiny_models.flux(single=1)
    seen = []
    with visattn.apply(model, "topk(keep=0.25, block=2x3)", strict=True, backend="tiles", caught=16) as handle:
        handle.watch(seen.append)
        tiny_models.run(model, inputs)
        handle.watch(None)
        tiny_models.run(model, inputs)
        report = handle.report()
    assert len(seen) == 2
    for site in report.modules:
        watched = next(w for w in seen if w.site == site.site)
        mass = caught_mass(watched, watched.layouts[0], slice(None), 16)
        assert site.caught.mean == pytest.approx(mass.mean().item(), abs=1e-5)
        assert site.caught.least == pytest.approx(mass.min().item(), abs=1e-5)
    worst = min(report.modules, key=lambda site: site.caught.mean)
    assert f"least in {worst.site} with {worst.caught.mean:.3f}" in " ".join(str(report).split())
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["caught"].keys() == {"mean", "least", "most"}
    with visattn.apply(model, "topk(keep=0.25, block=2x3)", strict=True) as handle:
        tiny_models.run(model, inputs)
        assert all(site.caught is None for site in handle.report().modules)
    for value in (-1, True, 0.5):
        with pytest.raises(ValueError, match="must be how many queries of a call are looked at"):
            visattn.apply(model, "topk(keep=0.25, block=2x3)", caught=value)
    with pytest.raises(ValueError, match="at least 1"):
        Caught(0)
