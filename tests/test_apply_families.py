"""Every model family: dense is stock to the bit, sparse reaches every module, undo restores by identity."""

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_models

import visattn


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request):
    build, sites, pattern = tiny_models.FAMILIES[request.param]
    model, inputs = build()
    return model, inputs, sites, pattern


def state(model):
    """Everything that a patch may touch, by identity."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            found[name] = module.processor, getattr(module.processor, "_attention_backend", None)
        hooks = module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs
        found[name, "hooks"] = [list(h.values()) for h in hooks], hasattr(module, "_diffusers_hook")
    return found


def same(before, after):
    return before.keys() == after.keys() and all(
        all(a is b if not isinstance(a, list) else a == b for a, b in zip(before[k], after[k], strict=True))
        for k in before
    )


def test_dense_is_stock_and_undo_restores(family):
    model, inputs, sites, _ = family
    stock, before = tiny_models.run(model, inputs), state(model)
    handle = visattn.apply(model, "dense")
    assert torch.equal(tiny_models.run(model, inputs), stock)
    report = handle.report()
    assert report.dense == len(report.sites) == sites and not report.fallbacks
    handle.remove()
    handle.remove()
    assert same(before, state(model))
    assert torch.equal(tiny_models.run(model, inputs), stock)


def test_covering_pattern_is_stock(family):
    model, inputs, sites, _ = family
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "na(window=-1)", strict=True) as handle:
        assert torch.equal(tiny_models.run(model, inputs), stock)
        report = handle.report()
    assert report.sites_hit == sites and report.density == 1
    assert {site.calls[0].backend for site in report.sites} == {"stock"}


def test_sparse_reaches_every_module_and_differs(family):
    model, inputs, sites, pattern = family
    stock, before = tiny_models.run(model, inputs), state(model)
    with visattn.apply(model, pattern, strict=True) as handle:
        sparse = tiny_models.run(model, inputs)
        report = handle.report()
    assert report.sites_hit == report.hits == sites and not report.fallbacks and not report.dense
    assert torch.isfinite(sparse).all() and not torch.allclose(sparse, stock)
    assert same(before, state(model))


def test_reference_backend_gives_the_same(family):
    model, inputs, _, pattern = family
    with visattn.apply(model, pattern):
        auto = tiny_models.run(model, inputs)
    with visattn.apply(model, pattern, backend="reference") as handle:
        torch.testing.assert_close(tiny_models.run(model, inputs), auto, rtol=1e-4, atol=1e-5)
        assert {call.backend for site in handle.report().sites for call in site.calls} == {"reference"}
