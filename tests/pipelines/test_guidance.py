"""guide(): sums with perturbed predictions, against diffusers' own pipelines and against runs without guidance."""

import functools
import types

import diffusers
import pytest
import torch

import visattn
from tests.support import tiny_images, tiny_models, tiny_pipelines
from tests.support.oracles import grid_tokens
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn import Layout
from visattn.runtime.perturbed import Blur
from visattn.runtime.rest import Rest, Rested


def build(name):
    pipe, options = tiny_pipelines.PIPELINES[name][0]()
    return pipe, {**options, "output_type": "latent"}


@functools.cache
def shared(name):
    """A pipeline for tests that leave it as it was."""
    return build(name)


def latents(pipe, options, steps=1, **more):
    """What a pipeline has after some steps from fixed noise."""
    return tiny_pipelines.generate(pipe, {**options, **more}, steps)


def near(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


# Options of a run whose prediction is guided by a prompt, and of one that predicts with the prompt alone.
NONE, TRUE = {"guidance_scale": 1.0}, {"true_cfg_scale": 4.0, "negative_prompt": "dog"}
SUMS = {
    "one batch": ("stable_diffusion", {"guidance_scale": 5.0}, NONE),
    "one batch, joint attention": ("stable_diffusion3", {"guidance_scale": 5.0}, NONE),
    "one batch, video": ("cogvideox", {"guidance_scale": 5.0}, NONE),
    "two calls": ("wan", {"guidance_scale": 5.0}, NONE),
    "two calls, true": ("flux", TRUE, {}),
    "distilled": ("flux", {}, {}),
    "distilled, video": ("hunyuan_video", {}, {}),
}


@pytest.mark.parametrize("name", SUMS)
def test_sum(name):
    """One step is linear in the prediction: what guidance adds is `w (c - p)`, both from runs of their own."""
    family, guided, alone = SUMS[name]
    pipe, options = shared(family)
    plain, c = latents(pipe, options, **guided), latents(pipe, options, **alone)
    with visattn.guide(pipe, 2.0, layers=[0]) as handle:
        found = latents(pipe, options, **guided)
        assert f"1 of {2 if 'two' in name else 1} forwards guided by 2 times" in handle.report()
    with visattn.apply(pipe, "na(window=1)", layers=[0]):
        p = latents(pipe, options, **alone)
    assert (c - p).abs().max() > 1e-3
    near(found, plain + 2.0 * (c - p))


def test_embedded_pipeline():
    """Those that ship with the package stack [c, u]."""
    pipe = tiny_pixel_flux()
    noise = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def run(scale):
        options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "latents": noise, "output_type": "pt"}
        states = []
        keep = lambda pipe, step, t, tensors: states.append(tensors["latents"]) or tensors  # noqa: E731
        pipe(["a cat", "a dog"], guidance_scale=scale, callback_on_step_end=keep, **options)
        return states[0]

    plain, c = run(4.0), run(1.0)
    with visattn.guide(pipe, 2.0, layers=[0]):
        found = run(4.0)
    with visattn.apply(pipe, "na(window=1)", layers=[0]):
        p = run(1.0)
    assert (c - p).abs().max() > 1e-4
    near(found, plain + 2.0 * (c - p))


def test_two_calls_without_contexts():
    """FluxImg2ImgPipeline says nothing of its calls but whose tensors it gives them."""
    pipe, options = shared("flux")
    pipe = diffusers.FluxImg2ImgPipeline(**pipe.components)
    options = {
        **options,
        "image": torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0)),
        "strength": 1.0,
    }
    guided = {"true_cfg_scale": 4.0, "negative_prompt": "dog"}
    plain, c = latents(pipe, options, **guided), latents(pipe, options)
    with visattn.guide(pipe, 2.0, layers=[0]) as handle:
        found = latents(pipe, options, **guided)
        assert "1 of 2 forwards guided" in handle.report()
    with visattn.apply(pipe, "na(window=1)", layers=[0]):
        p = latents(pipe, options)
    assert (c - p).abs().max() > 1e-3
    near(found, plain + 2.0 * (c - p))


def test_second_transformer():
    """Wan 2.2's second transformer has a scale of its own."""
    pipe, options = tiny_pipelines.wan(second=True)
    pipe.register_to_config(boundary_ratio=1.1)
    options |= {"output_type": "latent", "guidance_scale": 3.0}
    plain, c = latents(pipe, options, guidance_scale_2=5.0), latents(pipe, options, guidance_scale_2=1.0)
    with visattn.guide(pipe, 2.0, layers=[0]):
        found = latents(pipe, options, guidance_scale_2=5.0)
    with visattn.apply(pipe, "na(window=1)", layers=[0]):
        p = latents(pipe, options, guidance_scale_2=1.0)
    near(found, plain + 2.0 * (c - p))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_stable_diffusion_oracle(scale):
    pipe, options = shared("stable_diffusion")
    with visattn.guide(pipe, 3.0, layers=["mid_block*"]):
        found = latents(pipe, options, 2, guidance_scale=scale)
    theirs = diffusers.StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])
    near(found, latents(theirs, options, 2, guidance_scale=scale, pag_scale=3.0))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_stable_diffusion3_oracle(scale, monkeypatch):
    # Its processors know neither image-only attention nor norms of queries and keys.
    monkeypatch.setattr(tiny_models, "sd3", one_attention)
    pipe, options = build("stable_diffusion3")
    with visattn.guide(pipe, 3.0, layers=["transformer_blocks.1"]):
        found = latents(pipe, options, 3, guidance_scale=scale)
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    theirs = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    near(found, latents(theirs, options, 3, guidance_scale=scale, pag_scale=3.0))


def one_attention():
    model, inputs = tiny_images.sd3()
    model = diffusers.SD3Transformer2DModel.from_config({**model.config, "dual_attention_layers": (), "qk_norm": None})
    return tiny_models.seeded(lambda: model), inputs


def test_heads_and_strength():
    """Chosen heads are mixed with what a token sees of itself and the text; other heads and text rows are as ever."""
    pipe, options = shared("flux")
    attn, seen, into = pipe.transformer.transformer_blocks[0].attn, [], {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: into.update({name: args[0]}))
        for name, module in (("text", attn.to_add_out), ("grid", attn.to_out[0]))
    ]
    with visattn.guide(pipe, 2.0, heads={"0": [1]}, strength=0.25) as guidance:
        guidance.handle.watch(seen.append)
        latents(pipe, options)
    for hook in hooks:
        hook.remove()
    path = "transformer_blocks.0.attn"
    seen = [each for each in seen if each.site.startswith(path)]
    assert [each.site for each in seen] == [path, f"{path} (perturbed)", path]
    layout = seen[1].layouts[0]
    assert layout.prefix == 8 and layout.tokens == into["grid"].shape[1]
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    mask[8:, 8:] = torch.eye(layout.tokens, dtype=torch.bool)
    logits = torch.einsum("bihd,bjhd->bhij", seen[2].q.double(), seen[2].k.double()) * seen[2].scale
    plain = logits.softmax(-1)
    shares = torch.tensor([0.0, 0.25, 0.0, 0.0][: plain.shape[1]], dtype=torch.float64)[:, None, None]
    weights = (1 - shares) * plain + shares * logits.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, seen[2].v.double()).flatten(2).float()
    near(torch.cat([into["text"], into["grid"]], 1), expected)


@pytest.mark.parametrize("off", [{"scale": 0.0}, {"strength": 0.0}])
def test_nothing_is_exactly_nothing(off):
    pipe, options = shared("flux")
    plain = latents(pipe, options, 2)
    with visattn.guide(pipe, **off) as handle:
        assert torch.equal(latents(pipe, options, 2), plain)
        assert "0 forwards more" in handle.report()


@torch.no_grad()
def test_modules_at_rest_are_perturbed():
    """What passes by calls that are left dense, on a GPU, does not pass by those of a perturbed forward."""
    here, tally = types.SimpleNamespace(perturbed=None), types.SimpleNamespace(pass_on=lambda cell: True)
    run, tokens = types.SimpleNamespace(watcher=None, here=here, tally=tally), torch.zeros(1, 2, 3)
    rest = Rest("a", tokens.shape, tokens.dtype, tokens.device, Rested(run, None, ""))
    assert rest.passes(None, tokens)
    here.perturbed = {}
    assert not rest.passes(None, tokens)


def gaussian(layout, sigma):
    """Weights [grid, grid] of every pair, from distances."""
    at = torch.tensor(grid_tokens(layout.grid)).double()
    weights = torch.exp(-(torch.cdist(at, at) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "layout", [Layout((7,), prefix=2), Layout((3, 5), suffix=3), Layout((2, 3, 4), prefix=1, suffix=2)]
)
@pytest.mark.parametrize("sigma", [0.5, 2.0, float("inf")])
def test_blur(layout, sigma):
    """Means over the grid, each axis by its own size; text is left alone."""
    q = torch.randn(2, layout.length, 3, 4, generator=torch.Generator().manual_seed(0))
    found = Blur(sigma).queries(q, (layout,))
    first, last = layout.prefix, layout.prefix + layout.tokens
    expected = q.clone()
    expected[:, first:last] = torch.einsum("ij,bjhd->bihd", gaussian(layout, sigma), q[:, first:last].double()).float()
    near(found, expected)
    assert torch.equal(found[:, :first], q[:, :first]) and torch.equal(found[:, last:], q[:, last:])
    # Two samples that sit in different places.
    near(Blur(sigma).queries(q, (layout, layout)), expected)


def test_blurred_pipeline():
    """The perturbed forward attends with blurred queries and the keys that it had; a mean needs no sigma."""
    pipe, options = shared("flux")
    seen = []
    for text, sigma in (("blur(sigma=2)", 2.0), ("blur", float("inf"))):
        seen.clear()
        with visattn.guide(pipe, 2.0, text, layers=[0]) as guidance:
            guidance.handle.watch(seen.append)
            latents(pipe, options)
            assert f" {text} in 1" in guidance.report() and "1 perturbed calls" in guidance.report()
        plain, blurred = (each for each in seen if each.site == "transformer_blocks.0.attn")
        layout = Layout((6, 8), prefix=8)
        near(blurred.q, Blur(sigma).queries(plain.q, (layout,)))
        assert torch.equal(blurred.k, plain.k) and torch.equal(blurred.v, plain.v)


def test_span():
    """Guided are the forwards of the steps from start to stop."""
    pipe, options = shared("flux")
    for start, stop, guided in ((0.0, 0.5, 2), (0.5, 1.0, 2), (0.25, 0.75, 2), (0.0, 0.2, 1)):
        with visattn.guide(pipe, 1.0, start=start, stop=stop) as handle:
            latents(pipe, options, 4)
            assert f"{guided} of 4 forwards guided" in handle.report()


@pytest.mark.parametrize("after", [True, False])
def test_cache_is_not_poisoned(after):
    """Each kind of forward keeps its own: p is computed where c was, and later steps of c do not see it."""
    cache = diffusers.FirstBlockCacheConfig(threshold=1e9)
    pipe, options = build("flux")
    c = latents(pipe, options)
    with visattn.apply(pipe, "na(window=1)", layers=[1]):
        p = latents(pipe, options)
    pipe.transformer.enable_cache(cache)
    plain = latents(pipe, options, 3)
    if after:
        pipe.transformer.disable_cache()
    for scale, steps, expected in ((2.0, 1, c + 2.0 * (c - p)), (1e-9, 3, plain)):
        with visattn.guide(pipe, scale, layers=[1]) as handle:
            if after:
                pipe.transformer.enable_cache(cache)
            near(latents(pipe, options, steps), expected)
            assert f"{steps} of {steps} forwards guided" in handle.report()
            if after:
                pipe.transformer.disable_cache()


def test_cache_that_asks_for_the_step():
    """SeaCache gets in the perturbed forward what the pipeline told of the plain one."""
    if not hasattr(diffusers, "SeaCacheConfig"):
        pytest.skip("this diffusers has no SeaCache")
    pipe, options = build("wan")
    with visattn.guide(pipe, 2.0, layers=[0]):
        expected = latents(pipe, options, 2)
    pipe.transformer.enable_cache(diffusers.SeaCacheConfig(threshold=0.0, residual_order=0))
    with visattn.guide(pipe, 2.0, layers=[0]) as handle:
        near(latents(pipe, options, 2), expected)
        assert "2 of 4 forwards guided" in handle.report()


def test_sparse_pipeline():
    """A pipeline that is sparse already stays so in both predictions, and after the guidance is removed."""
    pipe, options = shared("flux")
    window, one = "na(window=3x3)", "na(window=1)"
    with visattn.apply(pipe, window) as handle:
        c = latents(pipe, options)
        with visattn.guide(pipe, 2.0, layers=[0], handle=handle):
            found = latents(pipe, options)
        assert torch.equal(latents(pipe, options), c)
    with visattn.apply(pipe, {"0": one, "1-": window}):
        p = latents(pipe, options)
    near(found, c + 2.0 * (c - p))


def test_away_from_a_pattern():
    pipe, options = shared("flux")
    c = latents(pipe, options)
    with visattn.guide(pipe, 1.5, "na(window=3x3)", layers=[0, 1]):
        found = latents(pipe, options)
    with visattn.apply(pipe, "na(window=3x3)", layers=[0, 1]):
        p = latents(pipe, options)
    near(found, c + 1.5 * (c - p))


def test_undo():
    pipe, options = shared("wan")
    model = pipe.transformer
    before = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    plain, names = latents(pipe, options), set(vars(model))
    handle = visattn.guide(pipe, 3.0)
    assert not torch.equal(latents(pipe, options), plain)
    handle.remove()
    handle.remove()
    after = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert set(vars(model)) == names and not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(latents(pipe, options), plain)


WRONG = {
    "scale=-1": ({"scale": -1.0}, r"scale=-1.0 must be a number from 0 up"),
    "scale=inf": ({"scale": float("inf")}, r"scale=inf must be"),
    "strength": ({"strength": 1.5}, r"strength=1.5 must be from 0 to 1"),
    "start": ({"start": 0.5, "stop": 0.5}, r"start=0.5 and stop=0.5 must be shares"),
    "stop": ({"stop": 1.5}, r"stop=1.5 must be shares"),
    "both": ({"layers": [0], "heads": {"0": [0]}}, "both say which layers"),
    "no heads": ({"heads": {"0": []}}, "must be indices of heads"),
    "layers": ({"layers": [9]}, "selects nothing"),
    "no layer": ({"heads": {"9": [0]}}, "selects nothing"),
    "perturb": ({"perturb": "blurr"}, "blurr"),
    "sigma": ({"perturb": "blur(sigma=0)"}, "positive sigma"),
    "merging": ({"perturb": "agentsd"}, "must be 'identity'"),
    "axes": ({"perturb": "na(window=3x3x3)"}, "3 axes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    options, text = WRONG[name]
    pipe, _ = shared("flux")
    model = pipe.transformer
    with pytest.raises(ValueError, match=text):
        visattn.guide(pipe, **options)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_wrong_targets():
    pipe, options = shared("flux")
    model = tiny_models.flux()[0]
    with pytest.raises(ValueError, match="needs the pipeline that adds up"):
        visattn.guide(model)
    with (
        visattn.apply(model, "dense") as other,
        pytest.raises(ValueError, match="no denoiser that this handle patched"),
    ):
        visattn.guide(pipe, handle=other)
    with visattn.apply(pipe, "dense") as own:
        with pytest.raises(ValueError, match="leave always out"):
            visattn.guide(pipe, handle=own, always=True)
        with visattn.guide(pipe, handle=own), pytest.raises(ValueError, match="guided already"):
            visattn.guide(pipe, handle=own)
        guided = visattn.guide(pipe, handle=own)
    with pytest.raises(ValueError, match="handle of the pipeline was removed"):
        latents(pipe, options)
    guided.remove()


def test_wrong_runs():
    pipe, options = shared("flux")
    with visattn.guide(pipe), pytest.raises(ValueError, match="no pipeline is calling FluxTransformer2DModel"):
        pipe.transformer(**tiny_models.flux()[1])
    with visattn.guide(pipe, heads={"0": [99]}), pytest.raises(ValueError, match="heads has 99 for"):
        latents(pipe, options)
    cache = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    pipe.transformer.enable_cache(cache)
    try:
        with visattn.guide(pipe), pytest.raises(ValueError, match="would mix perturbed attention with plain"):
            latents(pipe, options)
    finally:
        pipe.transformer.disable_cache()
    assert torch.isfinite(latents(pipe, options)).all()


def test_compiled():
    pipe, _ = build("flux")
    whole, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="is compiled"):
        visattn.guide(pipe)
    pipe.transformer = whole
    whole.compile_repeated_blocks()
    with pytest.raises(ValueError, match="is compiled, which hides"):
        visattn.guide(pipe)
