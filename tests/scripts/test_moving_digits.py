"""The video pipeline's contract, the embedded moving-digits model, its data, training and measurement."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


from tests.support.tiny_moving_digits import tiny_pipeline
from visattn.pipelines.embedded import EMBEDDED, load_embedded
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline, class_words


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def make(pipeline, labels, seed=0, **options):
    options = {"num_inference_steps": 2, "output_type": "pt"} | options
    return pipeline(labels, generator=torch.Generator().manual_seed(seed), **options).frames


class TestPipeline:
    def test_output_types(self, pipeline):
        tensor = make(pipeline, [1, 2])
        assert tensor.shape == (2, 4, 1, 16, 16)
        assert tensor.min() >= 0 and tensor.max() <= 1
        array = make(pipeline, [1, 2], output_type="np")
        assert array.shape == (2, 4, 16, 16, 1)
        np.testing.assert_allclose(array[..., 0], tensor[:, :, 0].numpy())
        pictures = make(pipeline, 1, output_type="pil")
        assert len(pictures[0]) == 4 and pictures[0][0].size == (16, 16)
        assert isinstance(pipeline([1], num_inference_steps=1, return_dict=False), tuple)

    def test_generator_class_and_latents_decide_the_result(self, pipeline):
        assert torch.equal(make(pipeline, [3]), make(pipeline, torch.tensor([3])))
        assert not torch.equal(make(pipeline, [3]), make(pipeline, [3], seed=1))
        assert not torch.equal(make(pipeline, [3]), make(pipeline, [4]))
        noise = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        given = pipeline([3], latents=noise, num_inference_steps=2, output_type="pt").frames
        assert torch.equal(given, make(pipeline, [3]))

    def test_guidance_mixes_class_and_null_class(self, pipeline):
        x, t = torch.randn(1, 1, 4, 16, 16), torch.tensor(500.0)
        pipeline._guidance_scale = 3.0
        guided = pipeline._predict_velocity(x, t, torch.tensor([3]))
        conditional, unconditional = (
            pipeline.transformer(
                x, timestep=t.expand(1), encoder_hidden_states=class_words(torch.tensor([c]), 10, 2)
            ).sample
            for c in (3, 10)
        )
        torch.testing.assert_close(guided, unconditional + 3.0 * (conditional - unconditional))

    def test_class_words_are_distinct_one_hot_rows(self):
        words = class_words(torch.arange(11), 10, 4)
        assert words.shape == (11, 4, 44)
        assert torch.equal(words.flatten(0, 1), torch.eye(44))

    @pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (3, 8, 20)])
    def test_other_sizes(self, pipeline, frames, height, width):
        videos = make(pipeline, [1], num_frames=frames, height=height, width=width)
        assert videos.shape == (1, frames, 1, height, width) and videos.isfinite().all()

    @pytest.mark.parametrize(
        ("labels", "options", "message"),
        [
            ([10], {}, "labels from 0 to 9"),
            ([1], {"height": 15}, "height 15 is not a multiple of the patch size 2"),
            ([1], {"num_frames": 0}, "num_frames 0 is not a multiple of the patch size 1: pass e.g. 1"),
            ([1], {"num_inference_steps": 0}, "pass 1 or more"),
            ([1], {"output_type": "mp4"}, "pil, pt, np"),
            ([1], {"latents": torch.zeros(1, 1, 2, 16, 16)}, r"expected \(1, 1, 4, 16, 16\)"),
            ([1], {"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1"),
            ([1], {"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ],
    )
    def test_errors_say_what_to_do(self, pipeline, labels, options, message):
        with pytest.raises(ValueError, match=message):
            pipeline(labels, **options)

    def test_save_and_load_keep_weights_and_sizes(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        again = PixelWanPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert again.num_classes == 10 and again.config.num_frames == 4
        assert torch.equal(make(again, [5]), make(pipeline, [5]))


class TestEmbedded:
    def test_is_what_the_catalogue_says(self):
        model, pipeline = EMBEDDED["moving-digits"], load_embedded("moving-digits")
        assert pipeline.num_classes == model.classes
        config = pipeline.config
        assert model.size == (config.num_frames, config.sample_size, config.sample_size)
        patch = pipeline.transformer.config.patch_size
        assert model.grid == tuple(n // p for n, p in zip(model.size, patch, strict=True))
        assert pipeline.transformer.dtype == torch.float32
        files = [file for file in model.folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 12_000_000

    def test_half_precision_keeps_wans_float32_layers(self):
        transformer = load_embedded("moving-digits", torch_dtype=torch.bfloat16).transformer
        assert transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
        assert transformer.blocks[0].scale_shift_table.dtype == torch.float32

    @pytest.mark.slow
    def test_what_is_drawn_moves_smoothly(self):
        from scripts.measure.moving_digits import figures, train_reader

        pipeline, labels = load_embedded("moving-digits"), torch.arange(3)
        pipeline.set_progress_bar_config(disable=True)
        videos = make(pipeline, labels, num_inference_steps=6).transpose(1, 2)
        reader, order = train_reader(), torch.randperm(videos.shape[2], generator=torch.Generator().manual_seed(0))
        smooth, mixed = (figures(reader, some, labels) for some in (videos, videos[:, :, order]))
        assert smooth["jerk"] < mixed["jerk"] / 4
        assert 0.3 < smooth["speed"] < 3


class TestData:
    def test_ways_are_straight_and_stay_inside(self):
        from scripts.train.moving_digits_data import SPEEDS, bounce, fly

        ways = fly(50, 40, torch.Generator().manual_seed(0))
        assert ways.shape == (50, 40, 2) and ways.abs().max() <= 0.5
        speed = ways.diff(dim=1).abs().median(dim=1).values.norm(dim=-1) / 2
        assert SPEEDS[0] * 0.9 <= speed.min() and speed.max() <= SPEEDS[1] * 1.1
        way = bounce(torch.tensor([0.75, 0.5]), torch.tensor([0.5, 0.0]), 4)
        torch.testing.assert_close(way[:, 0], torch.tensor([0.75, 0.75, 0.25, 0.25]))
        torch.testing.assert_close(way[:, 1], torch.full((4,), 0.5))

    def test_digits_are_drawn_where_they_should_be_and_can_be_read_back(self):
        from scripts.train.digits_data import real_digits
        from scripts.train.moving_digits_data import centers_of, cut_out, render

        images = real_digits()[0][:20]
        centers = torch.tensor([[[0.0, 0.0], [0.5, -0.25]]]).expand(20, 2, 2)
        theta = torch.eye(2, 3).expand(20, 2, 3)
        videos = render(images, centers, 32, theta)
        assert videos.shape == (20, 1, 2, 32, 32) and videos.min() >= -1 and videos.max() <= 1
        found = centers_of((videos + 1) / 2)
        moved = (found[:, 1] - found[:, 0]).mean(0)
        torch.testing.assert_close(moved, torch.tensor([0.5, -0.25]), atol=0.01, rtol=0)
        rows = cut_out((videos + 1) / 2)
        assert rows.shape == (20, 2, 64)
        assert (rows[:, 0] - rows[:, 1]).abs().mean() < 0.02

    def test_figures_tell_smooth_from_jumping(self):
        from scripts.measure.moving_digits import figures, train_reader
        from scripts.train.moving_digits_data import MovingDigits

        reader = train_reader()
        assert reader.real["video_rate"] > 0.95 and reader.real["frame_rate"] > 0.95
        videos, labels = MovingDigits().draw(40, 8, 32, torch.Generator().manual_seed(1))
        videos = (videos + 1) / 2
        smooth = figures(reader, videos, labels)
        jumping = figures(reader, videos[:, :, torch.randperm(8)], labels)
        assert smooth["jerk"] < jumping["jerk"] / 2
        assert figures(reader, videos, (labels + 1) % 10)["video_rate"] < 0.1


class TestTraining:
    def test_resumed_equals_uninterrupted(self, monkeypatch, tmp_path):
        from scripts.train import moving_digits as train_moving_digits
        from scripts.train import moving_digits_training
        from scripts.train.digits import run
        from scripts.train.moving_digits import Training
        from scripts.train.moving_digits_training import Config

        for module in (moving_digits_training, train_moving_digits):
            monkeypatch.setattr(module, "FRAMES", 4)
            monkeypatch.setattr(module, "SIZE", 16)
        config = Config(steps=2, finish_steps=2, batch=1, layers=1, tiny_share=0.5, pattern="na(window=1x3x3)")
        whole = Training(config, tmp_path / "whole")
        assert run(whole, sample_every=0, report=lambda _: None) > 0
        killed = Training(config, tmp_path / "killed")
        killed.step()
        killed.save()
        killed.step()
        resumed = Training(config, tmp_path / "killed")
        assert resumed.progress.step == 1 and resumed.progress.frames(config) == 2
        run(resumed, sample_every=0, report=lambda _: None)
        for one, other in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)
        loaded = PixelWanPipeline.from_pretrained(tmp_path / "whole" / "moving-digits")
        assert loaded.transformer.config.num_layers == 1 and loaded.config.num_frames == 4
        assert not list(tmp_path.rglob("*.tmp"))

    def test_stages_lengthen_the_clips(self):
        from scripts.train.moving_digits_training import Config, Progress

        config = Config(steps=10, tiny_share=0.4)
        assert [Progress(step=s).frames(config) for s in (0, 3, 4, 9)] == [4, 4, 8, 8]
        assert Progress(step=10, finish_step=10).frames(config) == 16
        with pytest.raises(ValueError, match="batch is 0: pass 1 or more"):
            Config(batch=0)
