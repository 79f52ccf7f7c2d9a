"""The text-to-video pipeline of the animoji model: prompts, sizes, guidance, patterns, and plain diffusers."""

import inspect

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import visattn
from tests.support.tiny_pixel_wan_text import tiny_pixel_wan_text

SIZE = {"num_frames": 3, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pixel_wan_text()


def make(pipeline, prompt, seed=0, **options):
    options = {"num_inference_steps": 2, "output_type": "pt", **SIZE, **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).frames


def test_clips_follow_prompt_and_seed_alone(pipeline):
    first = make(pipeline, "clapping hands")
    assert first.shape == (1, 3, 3, 16, 24)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.01
    assert torch.equal(first, make(pipeline, ["clapping hands"]))
    assert not torch.allclose(first, make(pipeline, "a red apple, still"))
    assert not torch.allclose(first, make(pipeline, "clapping hands", seed=1))


def test_a_batch_is_its_clips_one_by_one(pipeline):
    prompts = ["clapping hands", "rocket"]
    noise = torch.randn(2, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    both = make(pipeline, prompts, latents=noise)
    for i, prompt in enumerate(prompts):
        alone = make(pipeline, prompt, latents=noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_guidance_moves_from_the_null_prompt_to_the_prompt(pipeline):
    noise = torch.randn(1, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    velocities = {}
    for scale in (1.0, 2.0, 3.0):
        pipeline._guidance_scale = scale
        with torch.no_grad():
            text = pipeline.encode_prompt(["a red apple"])
            velocities[scale] = pipeline._predict_velocity(noise, torch.tensor(700.0), text)
    step = velocities[2.0] - velocities[1.0]
    assert step.abs().max() > 1e-4
    torch.testing.assert_close(velocities[3.0], velocities[1.0] + 2 * step, atol=1e-4, rtol=1e-3)


def test_the_noise_schedule_follows_the_tokens_of_a_clip(pipeline):
    """Its shift is 4 at 16x16x16 tokens, and half of it at a quarter of them."""
    for frames, side, shift in ((16, 64, 4.0), (4, 64, 2.0), (16, 32, 2.0), (1, 64, 1.0)):
        options = {"num_frames": frames, "height": side, "width": side, "num_inference_steps": 2}
        make(pipeline, "rocket", **options)
        middle = pipeline.scheduler.sigmas[1].item()
        plain = torch.linspace(1, 0.001, 2)[1].item()
        assert middle == pytest.approx(shift * plain / (1 + (shift - 1) * plain), rel=1e-3)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt '' is empty: say what to draw"),
        ("你好", {}, "has no character that this model knows: write it in English"),
        ("a cat", {"num_frames": 0}, "num_frames 0 is not a multiple of the patch size 1: pass e.g. 1"),
        ("a cat", {"num_frames": 1000}, "num_frames 1000 is more than this model has positions for: pass at most 256"),
        ("a cat", {"height": 30}, "height 30 is not a multiple of the patch size 4: pass e.g. 32"),
        ("a cat", {"width": 2000}, "width 2000 is more than this model has positions for: pass at most 1024"),
        ("a cat", {"num_inference_steps": 0}, "num_inference_steps is 0: pass 1 or more"),
        ("a cat", {"latents": torch.zeros(1, 3, 8, 8)}, r"latents have shape \(1, 3, 8, 8\)"),
    ],
)
def test_bad_input_is_named_before_the_model_runs(pipeline, monkeypatch, prompt, options, message):
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        make(pipeline, prompt, **options)
    if set(options) <= set(inspect.signature(pipeline.check_inputs).parameters):
        with pytest.raises(ValueError, match=message):
            pipeline.check_inputs(prompt, **options)


def test_it_is_wan_to_apply_and_a_full_window_is_dense(pipeline):
    dense = make(pipeline, "rocket")
    with visattn.apply(pipeline, "na(window=3x4x6)") as handle:
        full = make(pipeline, "rocket")
        report = handle.report()
    assert report.sites_hit == 1 and not report.fallbacks
    torch.testing.assert_close(full, dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(make(pipeline, "rocket"), dense)


def test_plain_diffusers_loads_its_folder(pipeline, tmp_path):
    import diffusers

    pipeline.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipeline)
    torch.testing.assert_close(make(again, "rocket"), make(pipeline, "rocket"))


def test_the_shipped_weights_read_their_prompts():
    from visattn.pipelines.embedded import EMBEDDED, load_embedded

    model, pipeline = EMBEDDED["animoji"], load_embedded("animoji")
    pipeline.set_progress_bar_config(disable=True)
    assert model.size == (pipeline.config.num_frames, pipeline.config.sample_size, pipeline.config.sample_size)
    assert model.grid == (16, model.size[1] // pipeline.patch_size, model.size[2] // pipeline.patch_size)
    prompts = ["beating heart, 3d", "frog, 3d"]
    heart, frog = make(pipeline, prompts, num_frames=2, height=64, width=64, num_inference_steps=6)
    for clip, channel in ((heart, 0), (frog, 1)):
        middle = clip[:, :, 24:40, 24:40].mean((0, 2, 3))
        assert middle.argmax() == channel and middle[channel] > middle.min() + 0.2
        assert clip[:, :, :2, :2].mean() > 0.9
