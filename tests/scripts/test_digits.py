"""The pixel pipeline's contract, the embedded digits model and its training."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from visattn.pipelines.embedded import EMBEDDED, embedded_models, load_embedded
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline

MAX_WEIGHTS_BYTES = {"animoji": 21_000_000, "emoji": 23_000_000}


def tiny_pipeline(dynamic_shifting=True):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=dynamic_shifting, base_shift=0.5, base_image_seq_len=64
    )
    pipeline = PixelDiTPipeline(transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def make(pipeline, labels, seed=0, **options):
    options = {"num_inference_steps": 2, "output_type": "pt"} | options
    return pipeline(labels, generator=torch.Generator().manual_seed(seed), **options).images


class TestPipeline:
    def test_output_types(self, pipeline):
        tensor = make(pipeline, [1, 2])
        assert tensor.shape == (2, 1, 16, 16)
        assert tensor.min() >= 0 and tensor.max() <= 1
        array = make(pipeline, [1, 2], output_type="np")
        assert array.shape == (2, 16, 16, 1)
        np.testing.assert_allclose(array[:, :, :, 0], tensor[:, 0].numpy())
        pictures = make(pipeline, 1, output_type="pil")
        assert pictures[0].size == (16, 16) and pictures[0].mode == "L"
        assert torch.equal(make(pipeline, [1, 2], return_dict=True), tensor)
        assert isinstance(pipeline([1], num_inference_steps=1, return_dict=False), tuple)

    def test_generator_decides_the_result(self, pipeline):
        assert torch.equal(make(pipeline, [3]), make(pipeline, torch.tensor([3])))
        assert not torch.equal(make(pipeline, [3]), make(pipeline, [3], seed=1))
        each = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        both = pipeline([3, 4], generator=each, num_inference_steps=2, output_type="pt").images
        torch.testing.assert_close(both[:1], make(pipeline, [3]))

    def test_latents_replace_drawn_noise(self, pipeline):
        noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        given = pipeline([3], latents=noise, num_inference_steps=2, output_type="pt").images
        assert torch.equal(given, make(pipeline, [3]))

    def test_guidance_mixes_class_and_null_class(self, pipeline):
        x, t, labels = torch.randn(1, 1, 16, 16), torch.tensor(500.0), torch.tensor([3])
        pipeline._guidance_scale = 3.0
        guided = pipeline._predict_velocity(x, t, labels)
        conditional, unconditional = (
            pipeline.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([c])).sample for c in (3, 10)
        )
        torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional))
        pipeline._guidance_scale = 1.0
        torch.testing.assert_close(pipeline._predict_velocity(x, t, labels), conditional)

    def test_guidance_off_runs_half_the_batch(self, pipeline):
        seen = []
        hook = pipeline.transformer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        make(pipeline, [1, 2], guidance_scale=1.0)
        make(pipeline, [1, 2], guidance_scale=2.0)
        hook.remove()
        assert seen == [2, 2, 4, 4]

    @pytest.mark.parametrize("size", [2, 10, 32])
    def test_other_sizes(self, pipeline, size):
        images = make(pipeline, [1], height=size, width=size)
        assert images.shape == (1, 1, size, size) and images.isfinite().all()

    def test_positions_scale_with_the_size(self, pipeline):
        embed = pipeline.transformer.pos_embed
        with torch.no_grad():
            small, large = (embed(torch.zeros(1, 1, s, s)).unflatten(1, (s // 2, s // 2)) for s in (16, 32))
        torch.testing.assert_close(large[:, ::2, ::2], small, atol=1e-5, rtol=1e-5)

    def test_shift_follows_the_size(self, pipeline):
        make(pipeline, [1], num_inference_steps=4)
        own = pipeline.scheduler.sigmas.clone()
        make(pipeline, [1], num_inference_steps=4, height=32, width=32)
        larger = pipeline.scheduler.sigmas
        odds = (larger / (1 - larger) / (own / (1 - own)))[1:-1]
        torch.testing.assert_close(odds, torch.full_like(odds, 2.0), atol=1e-4, rtol=1e-4)

    def test_static_shift_works(self):
        assert make(tiny_pipeline(dynamic_shifting=False), [1]).shape == (1, 1, 16, 16)

    def test_callback(self, pipeline):
        calls = []

        def callback(pipe, step, timestep, tensors):
            calls.append((pipe, step, float(timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        images = make(pipeline, [1, 2], num_inference_steps=3, callback_on_step_end=callback)
        assert [step for _, step, _ in calls] == [0, 1, 2] and calls[0][0] is pipeline
        assert calls[0][2] > calls[1][2] > calls[2][2]
        assert torch.equal(images, torch.full_like(images, 0.5))
        assert pipeline.num_timesteps == 3

    @pytest.mark.parametrize(
        ("labels", "options", "message"),
        [
            ([10], {}, "labels from 0 to 9"),
            ([-1], {}, "class label -1"),
            ([], {}, "one or more whole numbers"),
            ([0.5], {}, "whole numbers"),
            ([1], {"height": 15}, "height 15 is not a multiple of the patch size 2"),
            ([1], {"width": 0}, "width 0"),
            ([1], {"height": 32}, "32x16 is not square"),
            ([1], {"num_inference_steps": 0}, "pass 1 or more"),
            ([1], {"output_type": "jpeg"}, "pil, pt, np"),
            ([1], {"latents": torch.zeros(2, 1, 16, 16)}, r"expected \(1, 1, 16, 16\)"),
            ([1], {"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1"),
            ([1], {"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ],
    )
    def test_errors_say_what_to_do(self, pipeline, labels, options, message):
        with pytest.raises(ValueError, match=message):
            pipeline(labels, **options)

    def test_save_and_load(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        again = PixelDiTPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(make(again, [5]), make(pipeline, [5]))


class TestEmbedded:
    def test_names_need_no_heavy_imports(self):
        code = (
            "import sys; before = set(sys.modules); import visattn.pipelines; heavy = set(sys.modules) - before;"
            "from visattn.pipelines.embedded import embedded_models; assert 'digits' in embedded_models();"
            "new = (set(sys.modules) - before - heavy) & {'torch', 'diffusers'}; assert not new, new"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_unknown_name_lists_the_valid_ones(self):
        with pytest.raises(ValueError, match=f"unknown embedded model 'cats'.*{embedded_models()[0]}"):
            load_embedded("cats")

    def test_loads_as_float32_without_network(self, monkeypatch):
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("load_embedded used the network"))
        model, pipeline = EMBEDDED["digits"], load_embedded("digits")
        assert pipeline.transformer.dtype == torch.float32
        assert pipeline.num_classes == model.classes
        assert model.size == (pipeline.transformer.config.sample_size,) * 2
        assert model.grid == tuple(side // pipeline.patch_size for side in model.size)
        assert load_embedded("digits", torch_dtype=torch.bfloat16).transformer.dtype == torch.bfloat16

    @pytest.mark.parametrize("name", embedded_models())
    def test_weights_are_small_safetensors(self, name):
        files = [file for file in EMBEDDED[name].folder.rglob("*") if file.is_file()]
        assert {file.suffix for file in files} - {".md", ".txt"} == {".json", ".safetensors"}
        assert sum(file.stat().st_size for file in files) <= MAX_WEIGHTS_BYTES.get(name, 8_000_000)

    def test_digits_are_readable(self):
        assert readable_share(samples=10, steps=5) >= 0.8

    @pytest.mark.slow
    @pytest.mark.parametrize("pattern", ["dense", "na(window=9x9)"])
    def test_digits_are_readable_with_a_pattern(self, pattern):
        assert readable_share(samples=20, steps=8, pattern=pattern) >= 0.9


def readable_share(samples, steps, pattern="dense"):
    """Share of the embedded model's digits that a classifier of real digits reads as intended."""
    from scripts.measure.digits import pattern_of, train_reader

    pipeline = load_embedded("digits")
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(samples) % 10
    with pattern_of(pipeline, pattern, dense_steps=0):
        images = make(pipeline, labels, num_inference_steps=steps)
    return (train_reader(64).read(images * 2 - 1) == labels).float().mean()


class TestTraining:
    def test_augmented_digits_keep_their_label(self):
        from scripts.measure.digits import train_reader
        from scripts.train.digits_data import DigitBatches, downscale

        images, labels = DigitBatches(augment=0.6).draw(400, 32, torch.Generator().manual_seed(0))
        assert images.shape == (400, 1, 32, 32) and images.min() >= -1 and images.max() <= 1
        assert downscale(images).shape == (400, 1, 8, 8)
        assert (train_reader(32).read(images) == labels).float().mean() > 0.95

    def test_upscaling_can_be_undone(self):
        from scripts.train.digits_data import downscale, real_digits, upscale

        images = real_digits()[0][:50]
        for size in (16, 64):
            assert (downscale(upscale(images, size)) - images).abs().mean() < 0.05

    def test_resumed_equals_uninterrupted(self, tmp_path):
        from scripts.train.digits import Training, run
        from scripts.train.digits_training import Config

        config = Config(steps=4, finish_steps=1, batch=1, layers=1, finish_attention="dense", tiny_share=0.5)
        whole = Training(config, tmp_path / "whole")
        assert run(whole, sample_every=0, report=lambda _: None) > 0
        killed = Training(config, tmp_path / "killed")
        for _ in range(2):
            killed.step()
        killed.save()
        killed.step()
        resumed = Training(config, tmp_path / "killed")
        assert resumed.progress.step == 2
        run(resumed, sample_every=0, report=lambda _: None)
        for one, other in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)
        loaded = PixelDiTPipeline.from_pretrained(tmp_path / "whole" / "digits")
        assert loaded.transformer.config.num_layers == 1
        assert not list(tmp_path.rglob("*.tmp"))

    def test_checkpoint_of_another_run_is_refused(self, tmp_path):
        from scripts.train.digits import Training
        from scripts.train.digits_training import Config

        Training(Config(layers=1), tmp_path).save()
        with pytest.raises(ValueError, match=r"seed 0 then, 1 now.*--no-resume"):
            Training(Config(layers=1, seed=1), tmp_path)
        assert Training(Config(layers=1, steps=9), tmp_path).config.steps == 9

    @pytest.mark.parametrize(
        "wrong", [{"batch": 0}, {"lr": 0.0}, {"coarse_share": 1.0}, {"finish_attention": "sparse"}, {"minutes": -1.0}]
    )
    def test_bad_settings_fail_before_work(self, wrong):
        from scripts.train.digits_training import Config

        with pytest.raises(ValueError, match="pass"):
            Config(**wrong)

    def test_time_budget_moves_the_schedule(self):
        from scripts.train.digits_training import Config, Progress

        config = Config(minutes=10.0, coarse_share=0.5, tiny_share=0.5)
        progress = Progress(step=200, seconds=100.0)
        assert not progress.advance(config) and progress.size(config) == 16
        progress.seconds = 200.0
        assert progress.size(config) == 32
        progress.seconds = 300.0
        assert not progress.advance(config) and progress.size(config) == 64
        assert progress.lr(config) < config.lr
        progress.seconds = 600.0
        assert progress.advance(config)
