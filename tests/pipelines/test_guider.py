"""PerturbedGuidance in diffusers' modular pipelines: sums against runs of their own, undo, and patches that stand."""

import types

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.42")

import diffusers
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

import visattn
from tests.support import tiny_models, tiny_pipelines, tiny_videos
from tests.support.tiny import noise, seeded
from tests.support.tiny_flux import flux
from visattn.pipelines.guidance.guider import PerturbedGuidance


def wan():
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=tiny_pipelines.wan()[0].transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    given = {"prompt_embeds": noise(1, 8, 32), "negative_prompt_embeds": noise(1, 8, 32, seed=1)}
    return pipe, {**given, "height": 48, "width": 64, "num_frames": 9}


def sd3():
    pipe = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    model = tiny_models.sd3()[0]
    pipe.update_components(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    given = {"prompt_embeds": noise(1, 5, 32), "negative_prompt_embeds": noise(1, 5, 32, seed=1)}
    pooled = {"pooled_prompt_embeds": noise(1, 64), "negative_pooled_prompt_embeds": noise(1, 64, seed=1)}
    return pipe, {**given, **pooled, "height": 96, "width": 128}


PIPES = {"wan": wan, "sd3": sd3}
WITHOUT, WITH = {"guidance_scale": 1.0}, {"guidance_scale": 4.0}


def ltx():
    pipe = LTXCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=tiny_videos.ltx()[0], scheduler=scheduler)
    masks = {"prompt_attention_mask": torch.ones(1, 8), "negative_prompt_attention_mask": torch.ones(1, 8)}
    given = {"prompt_embeds": noise(1, 8, 16), "negative_prompt_embeds": noise(1, 8, 16, seed=1)}
    return pipe, {**given, **masks, "height": 128, "width": 192, "num_frames": 9}


def run(pipe, options, guider=None, steps=1):
    if guider is not None:
        pipe.update_components(guider=guider)
    with torch.no_grad():
        made = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **options)
    return made.get("latents")


def plain(**options):
    return diffusers.ClassifierFreeGuidance(**options)


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("cfg", [WITHOUT, WITH])
def test_sum(name, cfg):
    """One step is linear in the prediction, with classifier-free guidance and without."""
    pipe, options = PIPES[name]()
    model = pipe.transformer
    guided, c = run(pipe, options, plain(**cfg)), run(pipe, options, plain(**WITHOUT))
    before = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    guider = PerturbedGuidance(**cfg, scale=2.0, layers=[0])
    found = run(pipe, options, guider)
    assert "1 of 1 steps guided by 2 times the difference to na(window=1)" in guider.report()
    after = {path: module.processor for path, module in model.named_modules() if hasattr(module, "processor")}
    assert all(before[path] is after[path] for path in before | after)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with visattn.apply(model, "na(window=1)", layers=[0]):
        p = run(pipe, options, plain(**WITHOUT))
    assert (c - p).abs().max() > 1e-3
    torch.testing.assert_close(found, guided + 2.0 * (c - p), rtol=1e-5, atol=1e-5)


def test_steps_and_patches_that_stand():
    """A sparse model stays sparse in all predictions, and patched afterwards; p only where the steps say."""
    pipe, options = sd3()
    window, one = "na(window=3x3)", "na(window=1)"
    with visattn.apply(pipe, window) as handle:
        c = run(pipe, options, plain(**WITHOUT))
        guider = PerturbedGuidance(**WITHOUT, scale=2.0, layers=[0])
        found = run(pipe, options, guider)
        assert torch.equal(run(pipe, options, plain(**WITHOUT)), c) and handle.report().hits
    with visattn.apply(pipe, {"0": one, "1-": window}):
        p = run(pipe, options, plain(**WITHOUT))
    torch.testing.assert_close(found, c + 2.0 * (c - p), rtol=1e-5, atol=1e-5)
    guider = PerturbedGuidance(**WITH, scale=2.0, heads={"0": [1]}, strength=0.5, perturb_start=0.25, perturb_stop=0.5)
    run(pipe, options, guider, 4)
    assert "1 of 4 steps guided" in guider.report()
    for off in ({"scale": 0.0}, {"strength": 0.0}, {"enabled": False}):
        cfg = WITHOUT if "enabled" in off else WITH
        assert torch.equal(run(pipe, options, PerturbedGuidance(**WITH, **off)), run(pipe, options, plain(**cfg)))


def test_caches_keep_predictions_apart():
    """LTX names its forwards: p is computed although what it differs in is behind the block that the cache looks at."""
    pipe, options = ltx()
    guider = PerturbedGuidance(**WITH, scale=2.0, layers=[1])
    stock, plain = run(pipe, options, guider), run(pipe, options, diffusers.ClassifierFreeGuidance(**WITH))
    assert (stock - plain).abs().max() > 1e-4
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    try:
        torch.testing.assert_close(run(pipe, options, guider), stock, rtol=1e-5, atol=1e-5)
        run(pipe, options, guider, 3)
        assert "5 of 5 steps guided" in guider.report()
    finally:
        pipe.transformer.disable_cache()
    torch.testing.assert_close(run(pipe, options, guider), stock, rtol=1e-5, atol=1e-5)
    mixing = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    pipe.transformer.enable_cache(mixing)
    with pytest.raises(ValueError, match="would mix perturbed attention with plain"):
        run(pipe, options, guider)
    assert not pipe.transformer._forward_pre_hooks


def test_other_sums():
    """c + s (c - u), and rescaled as diffusers does."""
    c, u, p = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    original = PerturbedGuidance(guidance_scale=4.0, scale=2.0, use_original_formulation=True)
    torch.testing.assert_close(original(batches(original, c, u, p))[0], c + 4 * (c - u) + 2 * (c - p))
    rescaled = PerturbedGuidance(guidance_scale=4.0, scale=0.0, guidance_rescale=0.7)
    theirs = plain(guidance_scale=4.0, guidance_rescale=0.7)
    torch.testing.assert_close(rescaled(batches(rescaled, c, u)).pred, theirs.forward(c, u).pred)


def batches(guider, *predictions):
    data = guider.prepare_inputs({"x": (torch.zeros(1), torch.ones(1))})
    assert [float(each.x) for each in data] == [0.0, 1.0, 0.0][: len(predictions)]
    for each, prediction in zip(data, predictions, strict=True):
        each.noise_pred = prediction
    return data


def test_settings_are_saved_and_loaded(tmp_path):
    made = PerturbedGuidance(guidance_scale=3.0, heads={"0": [1]}, perturb="blur(sigma=2)", perturb_stop=0.5)
    made.save_pretrained(tmp_path)
    again = PerturbedGuidance.from_pretrained(tmp_path)
    names = [name for name in made.config if not name.startswith("_")]
    assert "heads" in names and all(again.config[name] == made.config[name] for name in names)
    assert "difference to blur(sigma=2)" in again.report()
    assert made.new(scale=1.0).scale == 1.0


def test_a_failed_run_leaves_nothing_that_stays():
    """A forward that raises is not cleaned up by the pipeline: the next prediction does it."""
    pipe, options = wan()
    stock = run(pipe, options, plain(**WITHOUT))
    guider = PerturbedGuidance(**WITHOUT, heads={"0": [99]})
    with pytest.raises(ValueError, match="heads has 99 for"):
        run(pipe, options, guider)
    guider.scale = 0.0
    assert torch.equal(run(pipe, options, guider), stock)
    assert not pipe.transformer._forward_pre_hooks
    for wrong, text in (({"layers": [9]}, "selects nothing"), ({"perturb": "na(window=3x3)"}, "2 axes")):
        with pytest.raises(ValueError, match=text):
            run(pipe, options, PerturbedGuidance(**WITHOUT, **wrong))
        assert not pipe.transformer._forward_pre_hooks
    with pytest.raises(ValueError, match=r"strength=2.0 must be from 0 to 1"):
        PerturbedGuidance(strength=2.0)
    # What torch.compile() returns has the model under this name.
    compiled = types.SimpleNamespace(_orig_mod=pipe.transformer)
    guider = PerturbedGuidance(**WITHOUT, layers=[0])
    guider.prepare_models(compiled)
    with pytest.raises(ValueError, match="is compiled"):
        guider.prepare_models(compiled)


def test_guide_takes_modular_pipelines_without_a_guider():
    """FLUX's is distilled; the others are told which guider guides them."""
    model = flux()[0]
    model = seeded(type(model), **{**dict(model.config), "in_channels": 16})
    pipe = FluxCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    options = {"prompt_embeds": noise(1, 5, 32), "pooled_prompt_embeds": noise(1, 32), "height": 96, "width": 128}
    c = run(pipe, options)
    with visattn.guide(pipe, 2.0, layers=[0]):
        found = run(pipe, options)
    with visattn.apply(pipe, "na(window=1)", layers=[0]):
        p = run(pipe, options)
    torch.testing.assert_close(found, c + 2.0 * (c - p), rtol=1e-5, atol=1e-5)
    other, options = wan()
    with visattn.guide(other), pytest.raises(ValueError, match=r"give it visattn.*PerturbedGuidance"):
        run(other, options)
