"""Patched models of ComfyUI against masked dense attention, with what else a graph may do to them."""

import pytest
import torch
from torch.nn import functional

import visattn
from tests.support.comfy import (
    Executor,
    Flux,
    HunyuanVideo,
    MMDiT,
    ModelPatcher,
    UNetModel,
    WanModel,
    optimized_attention,
)
from visattn import Layout
from visattn.clients.comfy.patch import OVERRIDE, patch, run_of

CASES = {
    "wan": (WanModel, (1, 4, 3, 12, 16), {}, "na(window=3x3x3)", [Layout((3, 6, 8))]),
    "flux": (Flux, (2, 4, 12, 16), {}, "na(window=3)", [Layout((6, 8), prefix=7)]),
    "kontext": (Flux, (1, 4, 12, 16), {"refs": (1, 4, 8, 8)}, "na(window=3)", [Layout((6, 8), prefix=7, suffix=16)]),
    "mmdit": (MMDiT, (2, 4, 12, 16), {}, "na(window=3)", [Layout((6, 8), prefix=7)]),
    "unet": (UNetModel, (1, 4, 7, 9), {}, "na(window=3)", [Layout((7, 9)), Layout((4, 5))]),
}


def made(name):
    """A patcher, latents, text and further arguments of its forward."""
    kind, shape, more, *_ = CASES[name]
    torch.manual_seed(0)
    given = {"ref_latents": [torch.randn(more["refs"])]} if more else {}
    return ModelPatcher(kind().eval()), torch.randn(shape), torch.randn(shape[0], 7, 32), given


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_patched_model_equals_masked_dense_and_the_first_one_stays(name, monkeypatch):
    patcher, x, text, given = made(name)
    pattern, layouts = CASES[name][3:]
    stock = patcher.sample(x, text, **given)
    sparse = patch(patcher, pattern, backend="tiles", strict=True)
    found = sparse.sample(x, text, **given)
    report = run_of(sparse).report()
    assert {call.problem.layout for site in report.sites for call in site.calls} == set(layouts)
    assert report.hits == 6 and [site.site for site in report.sites] == ["attention.0", "attention.1"]
    assert torch.equal(patcher.sample(x, text, **given), stock) and OVERRIDE not in str(patcher.model_options)
    assert torch.equal(patch(patcher, "dense").sample(x, text, **given), stock)
    masks = {layout.length: visattn.dense_mask(visattn.parse(pattern), layout) for layout in layouts}
    attend = functional.scaled_dot_product_attention

    def masked(q, k, v, mask=None, **kwargs):
        mask = masks.get(q.shape[2]) if q.shape[2] == k.shape[2] else mask
        return attend(q, k, v, attn_mask=mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", masked)
    wanted = patcher.sample(x, text, **given)
    assert (wanted - stock).abs().max() > 1e-3 and (found - wanted).abs().max() <= 1e-5


@torch.no_grad()
def test_steps_percent_layers_and_few_tokens_stay_dense():
    patcher, x, text, _ = made("wan")
    stock = patcher.sample(x, text, steps=4)

    def hits(**options):
        sparse = patch(patcher, "na(window=3x3x3)", backend="tiles", **options)
        out = sparse.sample(x, text, steps=4)
        return run_of(sparse).report(), out

    assert hits(dense_steps=1)[0].hits == 6 and hits(dense_steps=0.5)[0].hits == 4
    # Noise levels 1, 0.75, 0.5 and 0.25, percent p is the level 1 - p.
    assert hits(start_percent=0.3)[0].hits == 4 and hits(end_percent=0.3)[0].hits == 4
    report, _ = hits(layers="1")
    assert [(site.site, site.hits) for site in report.sites] == [("attention.1", 4)]
    with pytest.warns(UserWarning, match="less than min_tokens=1000 tokens"):
        report, out = hits(min_tokens=1000)
    assert report.hits == 0 and report.dense == 8 and torch.equal(out, stock)


@torch.no_grad()
def test_a_sampler_of_two_evaluations_stays_in_its_step():
    patcher, x, text, _ = made("wan")
    sparse = patch(patcher, "na(window=3x3x3)", backend="tiles", dense_steps=1)
    sigmas, options = torch.tensor([1.0, 0.5, 0.0]), sparse.model_options["transformer_options"]
    # The second of each step lies between two noise levels; the model's own are float64 here.
    for sigma, hits in ((1.0, 0), (0.75, 2), (0.5, 4), (0.25, 6)):
        given = {**options, "sample_sigmas": sigmas, "sigmas": torch.tensor([sigma], dtype=torch.float64)}
        wrapper = options["wrappers"]["diffusion_model"]["visattn"][0]
        run = Executor(sparse.model._forward, sparse.model, [wrapper])
        run(x, sigma, text, transformer_options=given)
        assert run_of(sparse).report().hits == hits


# Arguments of the model, latents, of a frame to start from, and the layout; the text has 55 tokens.
HUNYUAN = {
    "video": ({}, (1, 4, 3, 6, 8), None, Layout((3, 3, 4), suffix=55)),
    "frame": ({}, (1, 4, 3, 6, 8), (1, 4, 1, 6, 8), Layout((3, 3, 4), prefix=12, suffix=55)),
    "image": ({"patch_size": (1, 1)}, (1, 4, 6, 8), None, Layout((6, 8), suffix=55)),
}


@pytest.mark.parametrize("name", HUNYUAN)
@torch.no_grad()
def test_text_longer_than_the_grid_refines_itself_densely(name, monkeypatch):
    options, shape, frame, layout = HUNYUAN[name]
    torch.manual_seed(0)
    patcher, x, text = ModelPatcher(HunyuanVideo(**options).eval()), torch.randn(shape), torch.randn(1, 55, 32)
    given = {} if frame is None else {"ref_latent": torch.randn(frame)}
    pattern = "na(window=3)"
    sparse = patch(patcher, pattern, backend="tiles", strict=True)
    found = sparse.sample(x, text, **given)
    report = run_of(sparse).report()
    assert {call.problem.layout for site in report.sites for call in site.calls} == {layout} and report.hits == 6
    mask, attend = visattn.dense_mask(visattn.parse(pattern), layout), functional.scaled_dot_product_attention
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v, *args, **more: attend(q, k, v, attn_mask=mask if q.shape[2] == layout.length else None),
    )
    stock = patcher.sample(x, text, **given)
    assert (found - stock).abs().max() <= 1e-5


@torch.no_grad()
def test_heads_that_share_keys_and_outputs_by_heads():
    torch.manual_seed(0)
    patcher, layout = ModelPatcher(WanModel().eval()), Layout((3, 6, 8))
    run_options = patch(patcher, "na(window=3x3x3)", backend="tiles", strict=True).model_options["transformer_options"]
    q, k, v = (torch.randn(2, heads, layout.length, 16) for heads in (4, 2, 2))
    more = {"skip_reshape": True, "skip_output_reshape": True, "enable_gqa": True, "scale": 0.3}

    def forward(x, timestep, context, transformer_options=None):
        given = {**more, "transformer_options": transformer_options}
        return optimized_attention(q, k, v, 4, **given)

    wrapper = run_options["wrappers"]["diffusion_model"]["visattn"][0]
    run = Executor(forward, patcher.model, [wrapper])
    found = run(torch.randn(2, 4, 3, 12, 16), 1.0, None, transformer_options=run_options)
    mask = visattn.dense_mask(visattn.parse("na(window=3x3x3)"), layout)
    wanted = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-5


@torch.no_grad()
def test_other_overrides_keep_what_stays_dense():
    patcher, x, text, _ = made("wan")
    stock, calls = patcher.sample(x, text), []

    def other(func, *args, **kwargs):
        calls.append(args[0].shape)
        return func(*args, **kwargs)

    before = patcher.clone()
    before.model_options["transformer_options"][OVERRIDE] = other
    assert torch.equal(patch(before, "dense").sample(x, text), stock) and len(calls) == 12
    alone = patch(patcher, "na(window=3x3x3)", backend="tiles").sample(x, text)
    calls.clear()
    assert torch.equal(patch(before, "na(window=3x3x3)", backend="tiles").sample(x, text), alone)
    assert len(calls) == 6  # the attention to the text
    # A later node takes the place of ours, and may call it.
    sparse = patch(patcher, "na(window=3x3x3)", backend="tiles")
    later = sparse.clone()
    ours = later.model_options["transformer_options"][OVERRIDE]
    later.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: ours(func, *args, **kwargs)
    calls.clear()
    assert torch.equal(later.sample(x, text), alone)
    assert run_of(later) is run_of(sparse) and run_of(later).report().hits == 6


@torch.no_grad()
def test_masks_of_keys_are_kept():
    patcher, x, text, _ = made("flux")
    hidden = torch.ones(2, 1, 55, dtype=torch.bool)
    hidden[1, :, 4:7] = False
    sparse = patch(patcher, "na(window=99)", backend="tiles", strict=True)
    found, wanted = (p.sample(x, text, attn_mask=hidden.expand(2, 55, 55)) for p in (sparse, patcher))
    assert (found - wanted).abs().max() <= 1e-5
    assert (wanted - patcher.sample(x, text)).abs().max() > 1e-3


@torch.no_grad()
def test_attention_that_asks_for_no_override_is_told(monkeypatch):
    patcher, x, text, _ = made("flux")
    stock = patcher.sample(x, text)
    # As versions of ComfyUI whose model hands its options to no attention.
    attend = Flux._attend
    monkeypatch.setattr(Flux, "_attend", lambda self, qkv, mask, options: attend(self, qkv, mask, None))
    with pytest.warns(UserWarning, match="no attention of this forward asked for an override"):
        assert torch.equal(patch(patcher, "na(window=3)", layers="1").sample(x, text), stock)
    with pytest.raises(ValueError, match=r"strict: 1 of 1 .*asked for an override.*: attention.1"):
        patch(patcher, "na(window=3)", layers="1", strict=True).sample(x, text)


def test_what_cannot_be_patched_says_so():
    patcher, x, text, _ = made("wan")
    with pytest.raises(ValueError, match="does not know where the tokens of a Linear sit: it knows Stable Diffusion"):
        patch(ModelPatcher(torch.nn.Linear(1, 1)), "na(window=3)")
    with pytest.raises(
        ValueError, match=r"2 axes but the tokens of Wan 2.1 and 2.2 are a \(frames, height, width\) grid"
    ):
        patch(patcher, "na(window=3x3)")
    with pytest.raises(ValueError, match="has parameters or merges tokens"):
        patch(patcher, "sigmoid()")
    padding = patch(patcher, "na(window=3x3x3)", strict=True)
    padding.model.pad_tokens_multiple = 32
    with torch.no_grad(), pytest.raises(ValueError, match="pads its text and its grid to multiples of 32 tokens"):
        padding.sample(x, text)
    del padding.model.pad_tokens_multiple
    odd = patch(patcher, "na(window=3x3x3)", strict=True)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"strict: 1 of 1 .*a sequence of 144 tokens is not grid 3x4x8"),
    ):
        patched = type("Odd", (WanModel,), {"patch_size": (1, 3, 2)})
        odd.model.__class__ = patched
        odd.sample(x, text)
