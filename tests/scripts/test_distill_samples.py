"""Distillation: cached samples, and settings that are refused before a model is loaded."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from scripts.distill import (
    cache_samples,
    samples,
    settings,
    training,
)
from scripts.distill import pipeline as distill
from scripts.distill.config import Config
from tests.support.runs import equal
from tests.support.tiny_distill import cache, tiny_pipeline_with_samples, words
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_with_samples(tmp_path_factory.mktemp("tiny"))


class TestSamples:
    def test_are_what_the_pipeline_made_and_told(self, folder):
        found = samples.SampleSet(folder / "samples")
        assert len(found) == 10
        assert found.index.kind == "flow"
        assert found.index.anchor == "hidden_states"
        assert found.index.time_scale == 1.0
        pipe = PixelDiTPipeline.from_pretrained(folder / "model")
        generator = torch.Generator().manual_seed(5)
        image = pipe([2], num_inference_steps=3, generator=generator, output_type="pt").images
        latents, told = found.take([5], torch.zeros(1))
        torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=1e-4)
        assert told["class_labels"].tolist() == [2]

    def test_rows_of_guidance_belong_to_the_sample(self, folder):
        found = samples.SampleSet(folder / "samples")
        _, told = found.take([3, 7, 7], torch.tensor([0.9, 0.2, 0.6]))
        # Row 0 is the label (index mod 3), row 1 the null class.
        assert told["class_labels"].tolist() == [3, 1, 3]

    def test_samples_that_a_device_holds_are_those_of_the_files(self, folder, monkeypatch):
        picks, rows = [9, 0, 4, 4], torch.tensor([0.9, 0.2, 0.49, 0.999])
        read = samples.SampleSet(folder / "samples").take(picks, rows)
        size = sum(path.stat().st_size for path in (folder / "samples").glob("shard-*"))
        for free, there in ((samples.HELD * size, True), (samples.HELD * size - 1, False)):
            monkeypatch.setattr(samples, "room", lambda device, free=free: free)
            found = samples.SampleSet(folder / "samples")
            held = found.take(picks, rows)
            assert (found._held(torch.device("cpu")) is not None) is there
            assert torch.equal(held[0], read[0])
            assert equal(held[1], read[1])

    def test_resume_makes_the_same_shards(self, folder, tmp_path):
        out = tmp_path / "samples"
        shutil.copytree(folder / "samples", out)
        (out / "index.json").unlink()
        samples.shard_path(out, 1).unlink()
        cache(folder, out)
        for path in (folder / "samples").glob("*.safetensors"):
            assert equal(load_file(path), load_file(out / path.name))

    def test_other_settings_are_refused(self, folder):
        with pytest.raises(SystemExit, match="other settings"):
            cache(folder, folder / "samples", "--seed", "3")

    def test_images_with_labels_of_their_folders(self, folder, tmp_path):
        from PIL import Image

        for label in (0, 2):
            (tmp_path / "in" / str(label)).mkdir(parents=True)
            pixels = np.full((12, 10), 255 * (label == 2), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / str(label) / "a.png")
        cache(folder, tmp_path / "out", "--images", str(tmp_path / "in"))
        latents, told = samples.SampleSet(tmp_path / "out").take([0, 1], torch.zeros(2))
        assert latents.shape == (2, 1, 8, 8)
        assert latents.mean((1, 2, 3)).tolist() == [-1.0, 1.0]
        assert told["class_labels"].tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (["--shard", "3"], "multiple of --batch"),
            (["--count", "0"], "at least 1"),
            (["--prompts", "nothing.txt"], "one of them"),
            (["--images", "nowhere"], "does not exist"),
            (["--size", "1x2x3"], "height x width"),
            (["--steps", "-1"], "below 0"),
            (["--guidance", "nan"], "guidance nan must be a finite number"),
            (["--guidance", "-5"], "--guidance -5 must be at least 0, or -1 for the pipeline's own"),
            (["--seed", str(2**64)], f"--seed {2**64} must be from 0 to "),
            (["--model", "digits", "--labels", "0-10"], "--labels 0-10: digits has labels from 0 to 9"),
            (["--model", "digits", "--size", "63"], "height 63 is not a multiple of the patch size 2"),
            (["--model", "emoji"], "emoji takes prompts: pass --prompts"),
            (["--dtype", "int4"], "dtype 'int4' does not exist"),
            (["--device", "gpu"], "device 'gpu' cannot be used"),
        ],
    )
    def test_wrong_settings(self, folder, tmp_path, more, error, monkeypatch):
        monkeypatch.setattr(cache_samples, "loaded_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            cache(folder, tmp_path / "out", *more)

    def test_a_typo_claims_no_folder(self, folder, tmp_path):
        with pytest.raises(SystemExit):
            cache(folder, tmp_path / "out", "--labels", "7")
        cache(folder, tmp_path / "out")
        with pytest.raises(SystemExit, match=r"holds samples of other settings .*seed 0 then, 1 now.*: pass another"):
            cache(folder, tmp_path / "out", "--seed", "1")

    def test_samples_that_are_no_numbers_are_not_kept(self, folder, tmp_path):
        with pytest.raises(SystemExit, match="samples from seed 0 on are not finite"):
            cache(folder, tmp_path / "out", "--guidance", "1e38")
        assert not list((tmp_path / "out").glob("shard-*"))

    def test_prompts_are_text(self, folder, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n b\xc3\xa4r \r\n")
        given = {"out": tmp_path / "out", "model": "emoji", "prompts": file}
        assert cache_samples.Settings(**given).conditions == ["a cat", "b\u00e4r"]
        for data, why in ((b"\n \r\n", "has no prompt"), (b"\xff\xfea\0", "is no text in UTF-8")):
            file.write_bytes(data)
            with pytest.raises(ValueError, match=why):
                cache_samples.Settings(**given)
        with pytest.raises(ValueError, match="is no file: pass a text file"):
            cache_samples.Settings(**given | {"prompts": tmp_path})

    def test_a_damaged_folder_is_said(self, folder, tmp_path):
        def damaged(name, change):
            shutil.rmtree(tmp_path / "samples", ignore_errors=True)
            shutil.copytree(folder / "samples", tmp_path / "samples")
            path = tmp_path / "samples" / name
            path.write_bytes(change(path.read_bytes()))
            with pytest.raises(ValueError, match=f"{name} .*: cache the samples again, into an empty folder"):
                samples.SampleSet(tmp_path / "samples")

        damaged("index.json", lambda data: data[:-5])
        damaged("index.json", lambda data: b"[]")
        damaged("shard-00001.safetensors", lambda data: data[:-5])
        other = (folder / "samples" / "shard-00002.safetensors").read_bytes()
        damaged("shard-00001.safetensors", lambda data: other)

    def test_a_missing_shard_is_named(self, folder, tmp_path):
        shutil.copytree(folder / "samples", tmp_path / "samples")
        samples.shard_path(tmp_path / "samples", 1).unlink()
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
            samples.SampleSet(tmp_path / "samples")


class TestConfig:
    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (["--pattern", "na(windows=3)"], "no parameter 'windows'"),
            (["--pattern", "dense"], "what the teacher has"),
            (["--pattern", "centroids(clusters=4)"], r"no gradient.*centroids\.followed, or take kmeans"),
            (["--quantize", "int4"], "'int4' does not exist: int8 or fp8"),
            (["--samples", "nowhere"], r"no index\.json"),
            (["--model", "nowhere"], "neither an embedded model"),
            (["--model", "digits"], "were made by"),
            (["--steps", "0"], "at least 1"),
            (["--clip", "-1"], "at least 0"),
            (["--ema", "1"], "from 0 to below 1"),
            (["--optimizer", "adam"], "adamw or prodigy or muon"),
            (["--optimizer", "muon", "--fsdp"], "needs whole weights"),
            (["--train", "all", "--lora", "2"], "needs projections to be put on, but --train is all"),
            (["--train", "q,z"], "'z' is none of"),
            (["--query-heads", "1"], "pass --attention-at after"),
            (["--train", "none", "--lora", "4"], "--train is none"),
            (["--denoising", "0", "--output", "0", "--attention", "0"], "every loss has weight 0"),
            (["--maps", "1"], r"linear or agent, not na\(window=3x3\)"),
            (["--micro-batch", "3"], "must be a multiple of"),
            (["--layers", "7"], "7"),
            (["--train", "none"], "leaves nothing to train"),
        ],
    )
    def test_wrong_settings(self, folder, tmp_path, more, error, monkeypatch):
        late = ("--micro-batch", "--layers", "none")
        if not any(word in more for word in late) or "--lora" in more:
            monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            distill.main(words(folder, tmp_path / "out", *more))

    def test_out_is_a_file(self, folder, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(SystemExit, match="is a file"):
            distill.main(words(folder, tmp_path / "out"))

    @pytest.mark.parametrize(
        ("more", "package"), [(["--optimizer", "prodigy"], "prodigyopt"), (["--tensorboard"], "tensorboard")]
    )
    def test_missing_packages_are_named(self, folder, tmp_path, more, package, monkeypatch):
        found = settings.importlib.util.find_spec
        monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None if name == package else found(name))
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            distill.main(words(folder, tmp_path / "out", *more))

    def test_help_has_every_setting(self, capsys):
        with pytest.raises(SystemExit):
            distill.main(["--help"])
        shown = capsys.readouterr().out
        assert all(settings.flag(entry) in shown for entry in settings.fields(Config))
