"""`visattn generate image` on a tiny random pixel DiT: outputs, the report's numbers, refusals, interruption."""

import importlib.metadata
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from visattn import Layout, dense_mask
from visattn.metrics import psnr, ssim

pytest.importorskip("diffusers")

from tests.support.tiny_pixel_dit import tiny_pixel_dit

STEPS, LAYERS, GRID = 3, 3, (8, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pixel_dit(LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def run(command):
    def call(*args):
        return command("generate", "image", *args)

    return call


@pytest.fixture
def generate(run, model, tmp_path):
    def call(*args, out=tmp_path / "out"):
        options = ("--model", model, "--pattern", "na(window=3x3)", "--steps", STEPS, "--out", out)
        return run(*options, *args)

    return call


def pixels(path):
    return torch.from_numpy(np.asarray(Image.open(path), np.float32) / 255)[None, None]


def test_compare_writes_pictures_and_a_true_report(generate, tmp_path):
    out = tmp_path / "out"
    status, printed, err = generate("--label", "3,5", "--compare", "--repeats", 2, "--seed", 7)
    assert status == 0, err
    names = {"sparse-000.png", "sparse-001.png", "dense-000.png", "dense-001.png", "comparison.png"}
    assert {p.name for p in out.iterdir()} == names | {"report.json", "report.html"}
    report = json.loads((out / "report.json").read_text())

    assert report["seeds"] == [7, 8]
    assert [i["label"] for i in report["images"]] == [3, 5]
    assert report["settings"]["pattern"] == "na(window=3x3)"
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["density"] == pytest.approx(dense_mask("na(window=3x3)", Layout(GRID)).float().mean().item())
    assert report["attention"]["hits"] == STEPS * LAYERS
    assert report["attention"]["sites_hit"] == LAYERS
    assert not report["attention"]["fallbacks"]
    for kind in ("sparse", "dense"):
        times = report["times"][kind]
        assert len(times["runs"]) == 4
        assert all(0 < r["attention_seconds"] < r["seconds"] for r in times["runs"])
        assert times["seconds"] == pytest.approx(np.median([r["seconds"] for r in times["runs"]]))
    for i, image in enumerate(report["images"]):
        a, b = (pixels(out / f"{kind}-{i:03}.png") for kind in ("sparse", "dense"))
        assert not image["equal"]
        assert image["psnr"] == pytest.approx(psnr(a, b).item(), abs=0.2)  # the files are rounded to 8 bits
        assert image["ssim"] == pytest.approx(ssim(a, b).item(), abs=1e-2)
    assert Image.open(out / "comparison.png").width > 3 * 256
    assert f"{report['mean']['psnr']:.1f} dB" in printed


def test_the_twin_is_the_stock_model_from_the_same_noise(generate, model, tmp_path):
    from visattn.pipelines.load import load_pipeline

    assert generate("--label", "3", "--compare", "--seed", 5)[0] == 0
    pipe = load_pipeline(str(model))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    stock = pipe([3], num_inference_steps=STEPS, generator=noise, output_type="pil").images[0]
    assert np.array_equal(np.asarray(stock.convert("L")), np.asarray(Image.open(tmp_path / "out/dense-000.png")))


def test_a_dense_pattern_gives_equal_pictures(generate, tmp_path):
    status, printed, _ = generate("--label", "1", "--compare", "--pattern", "dense")
    assert status == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"][0]["equal"]
    assert report["images"][0]["psnr"] is None
    assert "pictures are equal" in printed


def test_without_a_pattern_attention_is_the_model_s_own(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--model", model, "--label", "1", "--steps", 1)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["settings"]["pattern"] == "dense" and report["attention"]["hits"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dense-000.png", "report.json"}
    status, _, err = run("--model", model, "--label", "1", "--steps", 1)
    assert status == 2 and "out is not empty: pass --force" in err


def test_schedules_reach_the_model(generate, tmp_path):
    assert generate("--dense-steps", "1", "--dense-layers", "1", "--json")[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    sites = report["attention"]["sites"]
    assert sum(site["hits"] for site in sites if site["pattern"] != "dense") == (STEPS - 1) * (LAYERS - 1)


def test_json_is_pure_and_one_image_needs_no_label(generate, tmp_path):
    status, printed, _ = generate("--json")
    assert status == 0
    report = json.loads(printed)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"] == [{"index": 0, "seed": 0, "label": 0}]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"sparse-000.png", "report.json"}


def test_existing_output_is_kept_unless_forced_and_then_replaced_whole(generate, tmp_path):
    out = tmp_path / "out"
    assert generate("--label", "1,2", "--compare")[0] == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "report.json").read_text()
    status, _, err = generate("--label", "4")
    assert status == 2
    assert "is not empty: pass --force to overwrite what is there, or another folder" in err
    assert (out / "report.json").read_text() == before
    assert generate("--label", "4", "--force")[0] == 0
    assert {p.name for p in out.iterdir()} == {"notes.txt", "sparse-000.png", "report.json"}


def test_interruption_leaves_nothing(generate, monkeypatch, tmp_path):
    from visattn.pipelines.report import compare

    def interrupted(*args):
        (args[0] / "report.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "write", interrupted)
    status, _, _ = generate("--label", "4")
    assert status not in (0, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_killed_process_leaves_nothing(model, tmp_path, number):
    out = tmp_path / "out"
    options = ["--model", model, "--pattern", "na(window=3x3)", "--steps", "100000", "--out", out]
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from visattn.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "generate", "image", *map(str, options)])
    deadline = time.monotonic() + 100
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert out.exists()
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(timeout=100) != 0
    assert not out.exists()


def test_the_folder_is_checked_before_a_model_is_loaded(run, monkeypatch, tmp_path):
    from visattn.pipelines import load

    monkeypatch.setattr(load, "load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("x")
    for out, text in ((tmp_path / "file", "is a file: name a folder"), (tmp_path / "file/x", "cannot make folder")):
        status, _, err = run("--pattern", "dense", "--prompt", "x", "--out", out)
        assert status == 2
        assert text in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ("--prompt", "a cat"),
            "PixelDiTPipeline takes class labels and no prompt: pass --label 3 instead of --prompt",
        ),
        (("--label", "12"), "class label 12 does not exist: pass labels from 0 to 9"),
        (("--label", "a"), "--label 'a' must be whole numbers like 3 or 0,3,7 or 0-9"),
        (("--label", "5-3"), "--label '5-3' must be whole numbers"),
        (("--size", "31"), "height 31 is not a multiple of the patch size 2"),
        (("--size", "32x32x32"), "--size '32x32x32' must be a side in pixels like 64, or height x width like 512x768"),
        (("--dense-steps", "half"), "--dense-steps 'half' must be a count like 12 or a fraction like 0.25"),
        (("--dense-steps", "1.5"), "dense_steps=1.5 must be a count of steps like 12 or a fraction like 0.25"),
        (("--dense-layers", "9"), "dense_layers=9 leaves nothing of the 3 selected layers"),
        (("--layers", "9"), "selects nothing in DiTTransformer2DModel"),
        (("--pattern", "na(windov=3)"), "na has no parameter 'windov' (did you mean 'window'?)"),
        (("--backend", "fast"), "unknown backend 'fast'; backends: auto, "),
        (("--count", "0"), "count 0 must be at least 1"),
        (("--repeats", "0"), "repeats 0 must be at least 1"),
        (("--guidance", "nan"), "guidance nan must be a finite number"),
        (("--steps", "0"), "steps 0 must be at least 1"),
        (("--dtype", "int8"), "dtype 'int8' does not exist here: pass one of float32, bfloat16, float16"),
        (("--device", "abacus"), "device 'abacus' cannot be used on this machine"),
    ],
)
def test_bad_input(generate, tmp_path, args, text):
    status, printed, err = generate(*args)
    assert status == 2
    assert printed == ""
    assert text in err
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_found(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model, text in (
        ("digit", "model 'digit' is not an embedded model (digits"),
        ("./nowhere", "a folder here, or a hub id like owner/name"),
        ("empty", "folder empty has no model_index.json, so it is not a diffusers pipeline"),
        ("owner/nothing", "Without network, download it elsewhere and pass the path of its folder: --model path/to"),
        ("owner/FLUX.1-dev", "cannot get 'owner/FLUX.1-dev' from the hub"),
    ):
        status, _, err = run("--model", model, "--pattern", "dense", "--out", "out")
        assert status == 2
        assert text in err
    (tmp_path / "empty/model_index.json").write_text('{"_class_name": "DiTPipeline", "transformer": ["x", "y"]}')
    status, _, err = run("--model", "empty", "--pattern", "dense", "--out", "out")
    assert status == 2
    assert "cannot load the pipeline in empty" in err


def test_prompts_and_labels_are_for_the_models_that_take_them():
    from visattn.pipelines.generate import Settings, check

    class Text:
        def __call__(self, prompt, num_inference_steps=1):
            """Takes a prompt."""

    class Neither:
        def __call__(self, image):
            """Takes an image."""

    check(Text(), Settings(pattern="dense", prompts=("a cat",), steps=4))
    for pipe, settings, text in (
        (Text(), {"labels": (3,)}, "Text takes a prompt and no class labels: pass --prompt TEXT instead of --label"),
        (Text(), {}, "Text needs a prompt: pass --prompt TEXT"),
        (Text(), {"prompts": ("a",), "guidance": 2.0}, "Text has no guidance_scale: leave --guidance away"),
        (Text(), {"prompts": ("a",), "size": (8, 8)}, "Text has no height: leave --size away"),
        (Neither(), {}, "Neither takes neither a prompt nor class labels: call visattn.apply on it in Python"),
    ):
        with pytest.raises(ValueError, match=text):
            check(pipe, Settings(pattern="dense", **settings))


@pytest.mark.parametrize("compare", [True, False])
def test_pixels_that_are_no_numbers_are_said_and_not_written(model, compare):
    from visattn.pipelines.generate import Settings, run_all
    from visattn.pipelines.load import load_pipeline

    pipe = load_pipeline(str(model))
    next(pipe.transformer.parameters()).data.fill_(float("nan"))
    runs = run_all(pipe, Settings(pattern="na(window=3x3)", labels=(1,), steps=2, compare=compare), progress=False)
    with pytest.raises(ValueError, match=r"sparse image 0 .*no numbers: PixelDiTPipeline overflows in float32"):
        next(runs)


def test_generate_says_how_to_get_diffusers(generate, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = generate()
    assert status == 2
    assert "generate needs diffusers: pip install 'visattn[diffusers]'" in err
