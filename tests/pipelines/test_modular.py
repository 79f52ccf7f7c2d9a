"""The block of diffusers' modular pipelines."""

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")

from diffusers import ModularPipelineBlocks
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep

import visattn
from tests.support.modular_run import pipeline as made
from tests.support.modular_run import run
from visattn.pipelines.modular import sparse_attention


@pytest.fixture
def pipeline():
    return made()


@torch.no_grad()
def test_a_pattern_is_an_input_of_the_call(pipeline):
    stock = run(pipeline)
    assert stock.get("attention_report") is None
    sparse = run(pipeline, attention_pattern="na(window=3)", attention_dense_steps=1)
    report = sparse.get("attention_report")
    assert report.sites_hit == 3 and report.hits == 6 and report.dense == 3
    assert not torch.equal(sparse.get("latents"), stock.get("latents"))
    with visattn.apply(pipeline, "na(window=3)", dense_steps=1):
        assert torch.equal(run(pipeline).get("latents"), sparse.get("latents"))
    assert torch.equal(run(pipeline).get("latents"), stock.get("latents"))


@pytest.mark.crossing
@torch.no_grad()
def test_few_tokens_stay_dense_unless_the_call_says_otherwise(pipeline, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="no attention module .* ran its pattern"):
        found = run(pipeline, attention_pattern="na(window=3)")
    assert found.get("attention_report").hits == 0
    assert run(pipeline, attention_pattern="na(window=3)", attention_always=True).get("attention_report").hits == 9
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    sparse_attention(FluxCoreDenoiseStep(), "na(window=3)", always=True).save(tmp_path / "workflow")
    again = ModularPipelineBlocks.from_pretrained(str(tmp_path / "workflow"), trust_remote_code=True)
    loaded = again.init_pipeline()
    loaded.update_components(transformer=pipeline.transformer, scheduler=pipeline.scheduler)
    assert run(loaded).get("attention_report").hits == 9


@torch.no_grad()
def test_a_saved_workflow_has_the_pattern(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    block = sparse_attention(FluxCoreDenoiseStep(), "na(window=3)", dense_steps=1)
    block.save(tmp_path / "workflow")
    again = ModularPipelineBlocks.from_pretrained(str(tmp_path / "workflow"), trust_remote_code=True)
    loaded = again.init_pipeline()
    loaded.update_components(transformer=pipeline.transformer, scheduler=pipeline.scheduler)
    found = run(loaded)
    assert found.get("attention_report").hits == 6
    wanted = run(pipeline, attention_pattern="na(window=3)", attention_dense_steps=1)
    assert torch.equal(found.get("latents"), wanted.get("latents"))
    assert run(loaded, attention_pattern="dense").get("attention_report").hits == 0
    own = type("Own", (FluxCoreDenoiseStep,), {})
    with pytest.raises(ValueError, match="Own is no block as diffusers has it"):
        sparse_attention(own()).save(tmp_path)
    with pytest.raises(ValueError, match="is not saved: give its text"):
        sparse_attention(FluxCoreDenoiseStep(), visattn.parse("na(window=3)")).save(tmp_path)


@torch.no_grad()
def test_nothing_stays_behind_when_a_block_fails(pipeline):
    stock = run(pipeline).get("latents")
    with pytest.raises(ValueError, match="3 axes but the tokens"):
        run(pipeline, attention_pattern="na(window=3x3x3)")
    with pytest.raises(Exception, match="dense_steps"):
        run(pipeline, attention_pattern="na(window=3)", attention_dense_steps=-1)
    assert torch.equal(run(pipeline).get("latents"), stock)
    assert {"attention_pattern", "attention_dense_steps"} <= set(pipeline.blocks.input_names)
