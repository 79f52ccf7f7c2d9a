"""Whole pipelines: dense to the bit, sparse everywhere, dense first steps, undo, save and load."""

import pytest
import torch

pytest.importorskip("transformers")

import visattn
from tests.support import tiny_pipelines


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_pipeline(name, tmp_path):
    build, sites, forwards, pattern = tiny_pipelines.PIPELINES[name]
    pipeline, options = build()
    stock = tiny_pipelines.generate(pipeline, options, steps=2)
    assert torch.isfinite(stock).all()
    kind = type(pipeline.scheduler)
    with visattn.apply(pipeline, "dense", dense_steps=1):
        assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=2), stock)
    with visattn.apply(pipeline, pattern, dense_steps=1, strict=True) as handle:
        sparse = tiny_pipelines.generate(pipeline, options, steps=2)
        report = handle.report()
        if name == "stable_diffusion":
            pipeline.save_pretrained(tmp_path)
    assert (report.hits, report.dense) == (forwards * sites, forwards * sites)
    assert report.sites_hit == sites and not report.fallbacks
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, stock)
    assert type(pipeline.scheduler) is kind
    assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=2), stock)
    if name == "stable_diffusion":
        loaded = type(pipeline).from_pretrained(tmp_path)
        assert torch.equal(tiny_pipelines.generate(loaded, options, steps=2), stock)


def test_two_transformers_of_wan():
    pipeline, options = tiny_pipelines.wan(second=True)
    with visattn.apply(pipeline, "na(window=3x3x3)", dense_steps=1, strict=True) as handle:
        tiny_pipelines.generate(pipeline, options, steps=4)
        report = handle.report()
    assert {site.model for site in report.modules} == {"transformer", "transformer_2"}
    assert report.sites_hit == 4 and (report.hits, report.dense) == (3 * 2 * 2, 1 * 2 * 2)
