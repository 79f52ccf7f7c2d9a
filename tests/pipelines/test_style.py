"""style_transfer: what the original computes, joint sequences, whole pipelines, what it leaves behind."""

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import visattn
from tests.support import tiny_images, tiny_pipelines
from tests.support.places import GOLDEN
from tests.support.tiny import seeded
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn.pipelines.control import style_transfer
from visattn.pipelines.control.features import Features
from visattn.pipelines.control.injection import CONTENT, RESULT, STYLE, Where, adain, inject, source_of
from visattn.pipelines.control.latents import encode, packed, unpacked
from visattn.pipelines.control.trajectory import inverse_scheduler
from visattn.runtime.call import AttentionCall

GOLD = torch.load(GOLDEN / "style.pt", weights_only=True)


def test_injection_gives_what_the_original_gives():
    """A module of the original: the queries of x, in part the content's, at the style's keys and values."""
    state, heads = GOLD["state"], GOLD["q"].shape[0]
    own = [(GOLD["x"] @ state[f"to_{name}.weight"].T)[0].unflatten(1, (heads, -1)) for name in "qkv"]
    content, style = GOLD["q"].transpose(0, 1), [GOLD[name].transpose(0, 1) for name in "kv"]
    q = torch.stack([content, content, own[0]])
    k, v = (torch.stack([mine, theirs, mine]) for mine, theirs in zip(own[1:], style, strict=True))
    call, where = AttentionCall(q, k, v), Where(slice(None), slice(None), None)
    out = inject(call, RESULT, where, source_of(call, where), float(GOLD["gamma"]), float(GOLD["T"]))[None]
    out = out.flatten(2) @ state["to_out.0.weight"].T + state["to_out.0.bias"]
    torch.testing.assert_close(out, GOLD["out"], rtol=1e-10, atol=1e-10)


def test_adain_gives_what_the_original_gives():
    content, style, expected = GOLD["adain"]
    torch.testing.assert_close(adain(content, style), expected, rtol=1e-10, atol=1e-10)
    flat = torch.ones_like(content)
    assert torch.equal(adain(flat, style, 1e-4), style.mean((2, 3), keepdim=True).expand_as(flat))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_text_stays_the_results_own(kv_heads):
    made = torch.Generator().manual_seed(0)
    q = torch.randn(3, 9, 2, 4, generator=made, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, kv_heads, 4, generator=made, dtype=torch.float64)
    rows, valid = slice(3, 8), torch.rand(3, 9, generator=made) > 0.3
    valid[:, 3:8] = True
    call, where = AttentionCall(q, k, v), Where(rows, rows, valid)
    out = inject(call, RESULT, where, source_of(call, where), 0.6, 1.5)
    queries = 0.6 * q[CONTENT, rows] + 0.4 * q[RESULT, rows]
    for head in range(2):
        of = head * kv_heads // 2
        keys, values = (torch.cat([x[RESULT, :3], x[STYLE, rows], x[RESULT, 8:]])[:, of] for x in (k, v))
        logits = 1.5 * 0.5 * queries[:, head] @ keys.T
        expected = logits.masked_fill(~valid[RESULT], float("-inf")).softmax(-1) @ values
        torch.testing.assert_close(out[:, head], expected)


def pictures(height, width):
    made = np.random.default_rng(0)
    return made.random((height, width, 3), dtype=np.float32), made.random((height, width, 3), dtype=np.float32)


def same(model, before):
    found = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    assert found.keys() == before.keys() and all(found[name] is before[name] for name in found)
    assert not model._forward_hooks and not model._forward_pre_hooks


def processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def test_a_latent_pipeline():
    """Stable Diffusion: up blocks beyond the first with attention, the other layers sparse, and nothing left behind."""
    pipe, options = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    scheduler, before, (content, style) = pipe.scheduler, processors(pipe.unet), pictures(24, 16)
    given = {**options, "steps": 2, "output_type": "np", "layers": ["up_blocks.*"]}
    with visattn.apply(pipe, "na(window=3x3)", strict=True, always=True) as handle:
        found = style_transfer(pipe, content, style, handle=handle, **given)
        by_site = {site.site: site for site in handle.report().sites}
        injected = [name for name in by_site if name.startswith("up_blocks")]
        # Two steps of inversion and one of the way back run the pattern, then one injects.
        assert injected and all(by_site[name].fallbacks == {"style injection": 1} for name in injected)
        assert all(by_site[name].hits == 3 for name in injected)
        assert all(site.hits == 4 for name, site in by_site.items() if name not in injected)
    assert pipe.scheduler is scheduler and found.image.shape == (24, 16, 3)
    same(pipe.unet, before)
    plain = style_transfer(pipe, content, 1 - style, **given)
    assert np.abs(plain.image - found.image).max() > 1e-4 and not plain.report.hits
    same(pipe.unet, before)


def test_one_step_of_a_picture_in_its_own_style_is_the_pipelines_own():
    """All samples are alike: the content's queries and the style's keys are the result's own."""
    pipe = tiny_pixel_flux()
    content, _ = pictures(SIDE, SIDE)
    size = {"height": SIDE, "width": SIDE, "output_type": "np"}
    words = {"prompt": "a red apple, 3d", "generator": torch.Generator().manual_seed(3)}
    found = style_transfer(
        pipe, content, content, gamma=0.3, temperature=1.0, steps=1, start=0, noise="drawn", **words, **size
    )
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    expected = pipe(words["prompt"], latents=noise, guidance_scale=1.0, num_inference_steps=1, **size).images[0]
    np.testing.assert_allclose(found.image, expected, atol=1e-5)
    assert {"style injection"} == set(found.report.fallbacks)
    sharper = style_transfer(
        pipe, content, content, steps=1, start=0, noise="drawn", **{**words, "generator": None}, **size
    )
    assert np.abs(sharper.image - expected).max() > 1e-4


def packed_flux():
    pipe, options = tiny_pipelines.flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**options, "prompt": "a cat", "style_prompt": "a long story of two dogs", "steps": 2}


def latent_pipeline():
    pipe, options = tiny_pipelines.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**options, "layers": ["up_blocks.*"]}


def pixel_pipeline():
    return tiny_pixel_flux(), {"height": SIDE, "width": SIDE, "prompt": "a red apple, 3d", "style_prompt": "bus"}


@pytest.mark.parametrize("build", [packed_flux, latent_pipeline, pixel_pipeline])
def test_what_is_stored_is_what_a_batch_has(build):
    """With drawn noise both modes see the same content and style, so that only the batch differs."""
    pipe, options = build()
    content, style = pictures(options["height"], options["width"])
    given = {"steps": 3, "noise": "drawn", "output_type": "np", **options}
    with visattn.apply(pipe, "na(window=3x3)", always=True) as handle:
        batch, stored, other = (
            style_transfer(pipe, content, style, handle=handle, generator=torch.Generator().manual_seed(1), **each)
            for each in (given, given | {"mode": "store"}, given | {"mode": "store", "gamma": 0.3})
        )
        sites = handle.report().sites
    # Products of a batch of one are rounded in other places than those of three.
    off = np.abs(stored.image - batch.image).max()
    assert off < 1e-5 and off < np.abs(other.image - batch.image).max() / 30
    # All steps but the first of each run: one in a batch, two that store, two with what was stored.
    injected = [site for site in sites if site.fallbacks]
    assert injected and all(site.hits == 5 for site in injected)
    assert all(site.fallbacks == {"style injection": 5 * (given["steps"] - 1)} for site in injected)


def test_an_inversion_stores_what_it_has():
    """The content's queries and the style's keys and values, of the step at the same time on the way from noise."""
    pipe, options = latent_pipeline()
    content, style = pictures(24, 16)
    kept, seen = {}, []
    with pytest.MonkeyPatch.context() as patch:
        keep = Features.keep
        patch.setattr(
            Features,
            "keep",
            lambda self, site, source: (kept.__setitem__((site, self.step), source), keep(self, site, source)),
        )
        found = style_transfer(pipe, content, style, steps=3, mode="store", output_type="np", **options)
    assert {step for _, step in kept} == {1, 2}
    pipe.scheduler, plain = inverse_scheduler(pipe.scheduler.config), pipe.scheduler
    latents = encode(pipe, [content, style], {"height": 24, "width": 16})
    with visattn.apply(pipe, "topk(keep=1.0)", always=True) as handle:
        handle.watch(lambda call: seen.append(call))
        pipe(["", ""], latents=latents, guidance_scale=1.0, num_inference_steps=3, height=24, width=16)
        times = pipe.scheduler.timesteps.tolist()
    plain = type(plain).from_config(plain.config)
    plain.set_timesteps(3)
    assert times == plain.timesteps.tolist()[::-1]
    checked, passed = 0, Counter()
    for call in seen:
        source = kept.get((call.site, 2 - passed[call.site]))
        passed[call.site] += 1
        if source is not None:
            for own, other in ((source.q, call.q[CONTENT]), (source.k, call.k[STYLE]), (source.v, call.v[STYLE])):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked == len(kept) >= 4 and found.report.fallbacks["style injection"] == 2 * len(kept)


def test_packed_latents():
    """FLUX: the same picture in its own style is the pipeline's own, and statistics are those of latents."""
    pipe, options = packed_flux()
    size = {name: options[name] for name in ("height", "width")}
    latents = torch.randn(2, 1, 12, 16, generator=torch.Generator().manual_seed(0))
    tokens = packed(pipe, latents)
    assert tokens.shape == (2, 48, 4) and torch.equal(unpacked(tokens, latents.shape), latents)
    assert torch.equal(pipe._unpack_latents(tokens, 12, 16, pipe.vae_scale_factor), latents)
    content, _ = pictures(12, 16)
    drawn = {"noise": "drawn", "generator": torch.Generator().manual_seed(3), "output_type": "np", **options}
    del drawn["style_prompt"]
    found = style_transfer(pipe, content, content, gamma=0.3, temperature=1.0, start=0, **(drawn | {"steps": 1}))
    noise = torch.randn(1, 1, 12, 16, generator=torch.Generator().manual_seed(3))
    expected = pipe(
        "a cat",
        latents=packed(pipe, noise),
        guidance_scale=1.0,
        num_inference_steps=1,
        output_type="np",
        max_sequence_length=8,
        **size,
    ).images[0]
    np.testing.assert_allclose(found.image, expected, atol=1e-5)
    before = processors(pipe.transformer)
    content, style = pictures(12, 16)
    for mode in ("batch", "store"):
        inverted = style_transfer(pipe, content, style, mode=mode, output_type="np", **options)
        assert inverted.image.shape == (12, 16, 3) and np.isfinite(inverted.image).all()
    same(pipe.transformer, before)


def qwen_image():
    pipe = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=seeded(
            diffusers.AutoencoderKLQwenImage,
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.2, 0.3, 0.4],
            latents_std=[1.0, 2.0, 3.0, 4.0],
        ),
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_images.qwen()[0],
    )
    pipe.set_progress_bar_config(disable=True)
    width = pipe.transformer.config.joint_attention_dim

    def encode_prompt(prompt, **_):
        valid = torch.tensor([[True] * 3 + [len(each) > 3] * 2 for each in prompt])
        drawn = [torch.randn(5, width, generator=torch.Generator().manual_seed(len(each))) for each in prompt]
        return torch.stack(drawn), valid

    pipe.encode_prompt = encode_prompt
    return pipe, {"height": 48, "width": 64, "prompt": "cat", "style_prompt": "a long dog", "output_type": "np"}


def test_latents_of_means_and_deviations():
    """QwenImage: a VAE of clips whose latents are scaled by channel; texts of several lengths."""
    pipe, options = qwen_image()
    content, style = pictures(48, 64)
    size = {name: options[name] for name in ("height", "width")}
    found = encode(pipe, [content], size)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(content, **size)[:, :, None]
        raw = pipe.vae.encode(pixels).latent_dist.mode()[:, :, 0]
    for channel in range(4):
        wanted = (raw[:, channel] - (channel + 1) / 10) / (channel + 1)
        torch.testing.assert_close(found[:, channel], wanted)
    images = [
        style_transfer(pipe, content, style, steps=2, noise="drawn", generator=torch.Generator(), mode=mode, **options)
        for mode in ("batch", "store")
    ]
    assert images[0].image.shape == (48, 64, 3)
    np.testing.assert_allclose(images[0].image, images[1].image, atol=1e-5)


def test_too_much_to_store_is_refused_in_the_first_step():
    pipe, options = latent_pipeline()
    before, scheduler, calls = processors(pipe.unet), pipe.scheduler, []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"of each of 49 steps are more than the memory=0.0001 GiB"):
        style_transfer(pipe, *pictures(24, 16), steps=50, mode="store", memory=1e-4, **options)
    hook.remove()
    same(pipe.unet, before)
    assert pipe.scheduler is scheduler and len(calls) == 1


WRONG = {
    "gamma": ({"gamma": 1.5}, r"gamma=1.5 must be from 0 to 1"),
    "temperature": ({"temperature": 0.0}, r"temperature=0.0 must be a positive float32 number"),
    "start": ({"steps": 2, "start": 2}, r"start=2 and steps=2 must leave steps"),
    "noise": ({"noise": "white"}, "noise='white' must be"),
    "mode": ({"mode": "disk"}, "mode='disk' must be"),
    "memory": ({"memory": 0.0}, "memory=0.0 must be GiB"),
    "option": ({"latents": 1}, "sets latents itself"),
    "size": ({"height": None}, "needs the size"),
    "layers": ({"layers": [99]}, "selects nothing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused(name):
    options, text = WRONG[name]
    pipe = tiny_pixel_flux()
    before, scheduler = processors(pipe.transformer), pipe.scheduler
    content, style = pictures(SIDE, SIDE)
    with pytest.raises(ValueError, match=text):
        style_transfer(pipe, content, style, **{"prompt": "a cat", "height": SIDE, "width": SIDE, **options})
    with pytest.raises(ValueError, match=r"'style\.png' is a name: open it first"):
        style_transfer(pipe, content, "style.png", prompt="a cat", height=SIDE, width=SIDE)
    same(pipe.transformer, before)
    assert pipe.scheduler is scheduler


def test_pipelines_that_cannot_are_named():
    content, style = pictures(16, 16)
    pipe, options = tiny_pipelines.wan()
    with pytest.raises(ValueError, match=r"style_transfer: \w+ has no image processor"):
        style_transfer(pipe, content, style, **options)
    pipe, options = tiny_pipelines.flux()

    class OwnWay(type(pipe)):
        def _pack_latents(latents):
            return latents

    pipe.__class__ = OwnWay
    with pytest.raises(ValueError, match="OwnWay packs its latents in a way of its own"):
        style_transfer(pipe, content, style, **options)


def test_keys_of_text_beyond_the_queries_stay_the_results_own():
    """PRX: the grid alone asks, and text is before it among the keys."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, 4, generator=made, dtype=torch.float64) for n in (4, 7, 7))
    call, where = AttentionCall(q, k, v), Where(slice(0, 4), slice(3, 7), None)
    out = inject(call, RESULT, where, source_of(call, where), 0.6, 1.0)
    own = torch.cat([x[None, RESULT, :3] for x in (k, v)]), torch.cat([x[None, STYLE, 3:] for x in (k, v)])
    keys, values = torch.cat(own, 1)
    queries = 0.6 * q[CONTENT] + 0.4 * q[RESULT]
    weights = (torch.einsum("qhd,khd->hqk", queries, keys) / 2).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", weights, values))
