"""`visattn generate video` with prompts, on a tiny random model of the animoji model's class."""

import json

import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("av")

from tests.support.tiny_pixel_wan_text import tiny_pixel_wan_text

CLAP, CAT = "clapping hands", "a cat, animated"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pixel_wan_text().save_pretrained(folder)
    return folder


@pytest.fixture
def generate(command, model, tmp_path):
    def call(*args):
        options = ("--model", model, "--pattern", "na(window=3x3x3)", "--steps", 1, "--out", tmp_path / "out")
        return command("generate", "video", *options, *args)

    return call


def test_each_prompt_gets_a_clip_and_a_twin(generate, tmp_path):
    out = tmp_path / "out"
    status, _, err = generate("--prompt", CLAP, "--prompt", CAT, "--compare", "--size", "16x24", "--frames", 3)
    assert status == 0, err
    made = {f"{kind}-00{i}.{suffix}" for kind in ("sparse", "dense") for i in (0, 1) for suffix in ("mp4", "webp")}
    shared = {"comparison.webp", "sheet-000.png", "sheet-001.png", "report.json", "report.html"}
    assert {p.name for p in out.iterdir()} == made | shared
    report = json.loads((out / "report.json").read_text())
    assert [each["prompt"] for each in report["videos"]] == [CLAP, CAT]
    assert [site["grid"] for site in report["attention"]["sites"]] == [[3, 4, 6]]
    assert not report["attention"]["fallbacks"]
    with Image.open(out / "sparse-000.webp") as clip:
        assert clip.n_frames == 3
    assert CLAP in (out / "report.html").read_text()


def test_what_is_left_out_of_a_prompt_is_said_once(generate):
    status, _, err = generate("--prompt", "clapping hands and " * 20, "--size", 8, "--frames", 1)
    assert status == 0
    assert err.count("tokens and the model reads 31: it is cut after") == 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "PixelWanTextPipeline needs a prompt: pass --prompt TEXT"),
        (("--label", 3), "takes a prompt and no class labels: pass --prompt TEXT instead of --label"),
        (("--prompt", ""), "prompt '' is empty: say what to draw"),
        (("--prompt", "\u4f60\u597d"), "has no character that this model knows: write it in English"),
        (("--prompt", CLAP, "--frames", 0), "frames 0 must be at least 1"),
        (("--prompt", CLAP, "--frames", 257), "num_frames 257 is more than this model has positions for"),
        (("--prompt", CLAP, "--size", 30), "height 30 is not a multiple of the patch size 4: pass e.g. 32"),
    ],
)
def test_bad_input_ends_before_the_model_runs(generate, monkeypatch, tmp_path, args, text):
    from visattn.pipelines.embedded.pixel_wan_text import PixelWanTextPipeline

    monkeypatch.setattr(PixelWanTextPipeline, "_predict_velocity", lambda *_: pytest.fail("the model ran"))
    status, printed, err = generate(*args)
    assert (status, printed) == (2, "")
    assert text in err
    assert not (tmp_path / "out").exists()
