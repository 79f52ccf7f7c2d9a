"""`visattn generate image` with prompts, on a tiny random model of the emoji model's class."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.support.tiny_pixel_flux import tiny_pixel_flux

RED, CAT = "a red apple, 3d", "smiling cat, flat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pixel_flux().save_pretrained(folder)
    return folder


@pytest.fixture
def generate(command, model, tmp_path):
    def call(*args):
        options = ("--model", model, "--pattern", "na(window=4x4,stride=2x2)", "--steps", 1, "--out", tmp_path / "out")
        return command("generate", "image", *options, *args)

    return call


def test_each_prompt_gets_a_picture_and_a_twin(generate, tmp_path):
    out = tmp_path / "out"
    status, printed, err = generate("--prompt", RED, "--prompt", CAT, "--compare", "--size", "16x24", "--guidance", 1)
    assert status == 0, err
    names = {f"{kind}-{i:03}.png" for kind in ("sparse", "dense") for i in range(2)}
    assert {p.name for p in out.iterdir()} == names | {"comparison.png", "report.json", "report.html"}
    report = json.loads((out / "report.json").read_text())
    assert [each["prompt"] for each in report["images"]] == [RED, CAT]
    assert report["settings"]["prompts"] == [RED, CAT]
    assert report["seeds"] == [0, 1]
    assert report["attention"]["sites_hit"] == report["attention"]["sites_patched"] == 2
    assert not report["attention"]["fallbacks"]
    assert all(Image.open(out / name).size == (24, 16) for name in names)
    assert RED in (out / "report.html").read_text()
    assert "2 of 2 attention modules" in printed


def test_four_times_the_side_of_training_has_its_own_grid(generate, tmp_path):
    """The position ids cover the same square at every size, and the pattern finds their grid."""
    assert generate("--prompt", RED, "--size", 128)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [site["grid"] for site in report["attention"]["sites"]] == [[32, 32]] * 2
    assert report["density"] < 0.1


def test_prompts_go_round(generate, tmp_path):
    assert generate("--prompt", RED, "--prompt", CAT, "--count", 3, "--size", 8)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [each["prompt"] for each in report["images"]] == [RED, CAT, RED]


def test_guidance_reaches_the_model(generate, tmp_path):
    made = []
    for scale in (1, 6):
        assert generate("--prompt", RED, "--size", 16, "--guidance", scale, "--force")[0] == 0
        made.append(np.asarray(Image.open(tmp_path / "out/sparse-000.png")))
    assert not np.array_equal(*made)


def test_what_is_left_out_of_a_prompt_is_said_once(generate):
    status, printed, err = generate(
        "--prompt", "a cat \u2603", "--prompt", "a red apple and " * 20, "--size", 8, "--json"
    )
    assert status == 0
    json.loads(printed)
    assert err.count("visattn: warning: prompt 'a cat \u2603': the model does not know \u2603 and draws without\n") == 1
    assert err.count("tokens and the model reads 31: it is cut after") == 1
    assert "prompts.py" not in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "PixelFluxPipeline needs a prompt: pass --prompt TEXT"),
        (("--label", 3), "takes a prompt and no class labels: pass --prompt TEXT instead of --label"),
        (("--prompt", RED, "--prompt", ""), "prompt '' is empty: say what to draw"),
        (("--prompt", "\u4f60\u597d"), "has no character that this model knows: write it in English"),
        (("--prompt", RED, "--size", 30), "height 30 is not a multiple of the patch size 4: pass e.g. 32"),
        (("--prompt", RED, "--size", "32x31"), "width 31 is not a multiple of the patch size 4: pass e.g. 32"),
    ],
)
def test_bad_input_ends_before_the_model_runs(generate, monkeypatch, tmp_path, args, text):
    from visattn.pipelines.embedded.pixel_flux import PixelFluxPipeline

    monkeypatch.setattr(PixelFluxPipeline, "_predict_velocity", lambda *_: pytest.fail("the model ran"))
    status, printed, err = generate(*args)
    assert (status, printed) == (2, "")
    assert text in err
    assert not (tmp_path / "out").exists()
