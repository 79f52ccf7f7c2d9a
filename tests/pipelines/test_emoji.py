"""The text-to-image pipeline of the emoji model: prompts, sizes, guidance, patterns; and the weights that ship."""

import inspect
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import visattn
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn.pipelines.embedded import EMBEDDED, load_embedded
from visattn.pipelines.embedded.pixel_flux import position_ids, to_picture, to_tokens
from visattn.pipelines.embedded.prompts import PromptWarning, encode_tokens, tokenize

TEXT = 32


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pixel_flux()


def make(pipeline, prompt, seed=0, **options):
    options = {"num_inference_steps": 2, "output_type": "pt", **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images


def test_pictures_follow_prompt_and_seed_alone(pipeline):
    first = make(pipeline, "a red apple, 3d")
    assert first.shape == (1, 3, SIDE, SIDE)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.01
    assert torch.equal(first, make(pipeline, ["a red apple, 3d"]))
    assert not torch.allclose(first, make(pipeline, "a green heart, flat"))
    assert not torch.allclose(first, make(pipeline, "a red apple, 3d", seed=1))


def test_a_batch_is_its_pictures_one_by_one(pipeline):
    prompts = ["a red apple, 3d", "rocket"]
    noise = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    both = make(pipeline, prompts, latents=noise, height=24, width=40)
    for i, prompt in enumerate(prompts):
        alone = make(pipeline, prompt, latents=noise[i : i + 1], height=24, width=40)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_guidance_moves_from_the_null_prompt_to_the_prompt(pipeline):
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(700.0)
    velocities = {}
    for scale in (1.0, 2.0, 3.0):
        pipeline._guidance_scale = scale
        with torch.no_grad():
            velocities[scale] = pipeline._predict_velocity(noise, t, pipeline.encode_prompt(["a red apple"]))
    step = velocities[2.0] - velocities[1.0]
    assert step.abs().max() > 1e-3
    torch.testing.assert_close(velocities[3.0], velocities[1.0] + 2 * step, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(4, 4), (12, 20), (SIDE, SIDE), (64, 48)])
def test_every_multiple_of_four_is_a_size(pipeline, size):
    assert make(pipeline, "rocket", height=size[0], width=size[1], num_inference_steps=1).shape[2:] == size


def test_tokens_are_patches_in_reading_order():
    picture = torch.randn(2, 3, 12, 20)
    tokens = to_tokens(picture, 4)
    assert tokens.shape == (2, 15, 48)
    assert torch.equal(tokens[1, 7].view(3, 4, 4), picture[1, :, 4:8, 8:12])
    assert torch.equal(to_picture(tokens, (3, 5), 4), picture)


@pytest.mark.parametrize("spacing", [0.5, 1.0, 4.0])
def test_positions_cover_the_same_square_at_every_size(spacing):
    side = int(64 / spacing)
    ids = position_ids((side, side), spacing)
    assert ids.shape == (side * side, 3)
    edges = ids[0, 1:] - spacing / 2, ids[-1, 1:] + spacing / 2
    assert torch.equal(edges[0], torch.tensor([-0.5, -0.5])) and torch.equal(edges[1], torch.tensor([63.5, 63.5]))
    assert torch.equal(ids[1] - ids[0], torch.tensor([0, 0, spacing]))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt '' is empty: say what to draw"),
        (["a cat", " \n"], {}, r"prompt ' \\n' is empty"),
        ([], {}, "prompt is an empty list"),
        (7, {}, "prompt 7 is a int: pass a text or a list of texts"),
        ([7], {}, "prompt 7 is a int"),
        ("你好", {}, "has no character that this model knows: write it in English"),
        ("a cat", {"height": 30}, "height 30 is not a multiple of the patch size 4: pass e.g. 32"),
        ("a cat", {"width": 0}, "width 0 is not a multiple of the patch size 4: pass e.g. 4"),
        ("a cat", {"num_inference_steps": 0}, "num_inference_steps is 0: pass 1 or more"),
        ("a cat", {"output_type": "gif"}, "output_type 'gif' does not exist"),
        ("a cat", {"latents": torch.zeros(1, 3, 8, 8)}, r"latents have shape \(1, 3, 8, 8\)"),
    ],
)
def test_bad_input_is_named_before_the_model_runs(pipeline, monkeypatch, prompt, options, message):
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        make(pipeline, prompt, **options)
    known = inspect.signature(pipeline.check_inputs).parameters
    if set(options) <= set(known):
        with pytest.raises(ValueError, match=message):
            pipeline.check_inputs(prompt, **options)


def test_unknown_signs_and_long_prompts_are_used_and_said(pipeline):
    with pytest.warns(PromptWarning, match="does not know ☃ and draws without"):
        pipeline.check_inputs("a cat ☃")
    long = "a red apple and " * 20
    with pytest.warns(PromptWarning, match="tokens and the model reads 31: it is cut after"):
        ids = tokenize(pipeline.tokenizer, [long])
    assert ids.shape == (1, TEXT)
    assert ids[0, -1] == pipeline.tokenizer.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.check_inputs(["a red apple, 3d", "smiling face with heart-eyes, high contrast"])


def test_padding_changes_nothing(pipeline):
    ids = tokenize(pipeline.tokenizer, ["a red apple, 3d"])
    count = int((ids != pipeline.tokenizer.pad_token_id).sum())
    with torch.no_grad():
        padded, short = (encode_tokens(pipeline.text_encoder, each, 0) for each in (ids, ids[:, :count]))
    torch.testing.assert_close(padded.text[:, :count], short.text)
    torch.testing.assert_close(padded.pooled, short.pooled)
    assert not padded.text[:, count:].any()


@pytest.mark.parametrize("side", [SIDE // 2, SIDE, 2 * SIDE])
def test_it_is_flux_to_apply_and_a_full_window_is_dense(pipeline, side):
    size = {"height": side, "width": side}
    dense, grid = make(pipeline, "rocket", **size), side // 4
    with visattn.apply(pipeline, f"na(window={grid}x{grid})") as handle:
        full = make(pipeline, "rocket", **size)
        report = handle.report()
    assert report.sites_hit == len(report.modules) == 2 and not report.fallbacks
    torch.testing.assert_close(full, dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(make(pipeline, "rocket", **size), dense)


def test_a_window_sees_all_text_and_what_is_near(pipeline):
    from visattn import Layout, dense_mask

    with visattn.apply(pipeline, "na(window=3x3)") as handle:
        make(pipeline, "rocket")
        density = handle.report().density
    assert density == pytest.approx(dense_mask("na(window=3x3)", Layout((8, 8), prefix=TEXT)).float().mean().item())


def test_the_shipped_weights_read_their_prompts():
    model, pipeline = EMBEDDED["emoji"], load_embedded("emoji")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.sample_size == model.size[0] == model.size[1]
    assert model.grid == tuple(side // pipeline.patch_size for side in model.size)
    made = make(pipeline, ["smiling face, high contrast", "smiling face, flat"], height=64, width=64)
    black, colored = made[:, :, 16:48, 16:48].permute(0, 2, 3, 1).flatten(1, 2)
    assert 0.1 < black.mean() < 0.9 and black.std() > 0.3
    saturation = [(each.amax(1) - each.amin(1)).mean() for each in (black, colored)]
    assert saturation[0] < 0.1 and saturation[1] > 0.2
