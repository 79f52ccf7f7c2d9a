"""`visattn generate video` on a tiny random pixel Wan: files, the report's numbers, refusals."""

import inspect
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visattn import Layout, dense_mask
from visattn.metrics import psnr, ssim

pytest.importorskip("diffusers")
av = pytest.importorskip("av")

STEPS, FRAMES, SIDE, GRID = 3, 4, 16, (4, 8, 8)
PATTERN = "na(window=3x3x3)"
FILES = {"sparse-000.mp4", "sparse-000.webp", "sheet-000.png", "report.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.support.tiny_moving_digits import tiny_pipeline

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(command):
    def call(*args, kind="video"):
        return command("generate", kind, *args)

    return call


@pytest.fixture
def generate(run, model, tmp_path):
    def call(*args, out=tmp_path / "out"):
        return run("--model", model, "--pattern", PATTERN, "--steps", STEPS, "--out", out, *args)

    return call


def frames_of(path):
    """Frames of a file [T, H, W, 3] with values 0 to 1, and its frames per second."""
    with av.open(str(path)) as file:
        rate = file.streams.video[0].average_rate
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)]).astype(np.float32) / 255, rate


def stock(model, label, seed):
    """What the pipeline makes without visattn [T, H, W, 1], and its latents after every step."""
    from visattn.pipelines.load import load_pipeline

    pipe, trail = load_pipeline(str(model)), []
    pipe.set_progress_bar_config(disable=True)

    def keep(pipe, step, timestep, tensors):
        trail.append(tensors["latents"].clone())
        return {}

    noise = torch.Generator().manual_seed(seed)
    made = pipe([label], num_inference_steps=STEPS, generator=noise, output_type="np", callback_on_step_end=keep)
    return made.frames[0], trail


def test_image_and_video_have_the_same_options():
    """But what a video alone has: each command declares its own for typer."""
    from visattn.cli.generate import image, video

    of_image, of_video = (dict(inspect.signature(command).parameters) for command in (image, video))
    assert of_video.keys() - of_image.keys() == {"frames", "fps"}
    assert [name for name in of_video if name in of_image] == list(of_image)
    assert [name for name in of_image if of_image[name] != of_video[name]] == ["model"]


def test_compare_writes_videos_sheets_and_true_reports(generate, model, tmp_path):
    out = tmp_path / "out"
    status, printed, err = generate("--label", "3,5", "--compare", "--seed", 7)
    assert status == 0, err
    names = {f"{kind}-00{i}.{kind_of}" for kind in ("sparse", "dense") for i in (0, 1) for kind_of in ("mp4", "webp")}
    names |= {"comparison.webp", "sheet-000.png", "sheet-001.png", "report.json", "report.html"}
    assert {p.name for p in out.iterdir()} == names
    report = json.loads((out / "report.json").read_text())
    assert report["density"] == pytest.approx(dense_mask(PATTERN, Layout(GRID)).float().mean().item())
    assert report["attention"]["hits"] == STEPS * 2 and not report["attention"]["fallbacks"]
    assert [(v["label"], v["seed"]) for v in report["videos"]] == [(3, 7), (5, 8)]

    dense, dense_trail = stock(model, 3, 7)
    from visattn import apply
    from visattn.pipelines.load import load_pipeline

    pipe, trail = load_pipeline(str(model)), []
    pipe.set_progress_bar_config(disable=True)
    with apply(pipe, PATTERN):
        made = pipe(
            [3],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            callback_on_step_end=lambda pipe, i, t, tensors: trail.append(tensors["latents"].clone()) or {},
        )
    sparse = made.frames[0]
    first = report["videos"][0]
    error = ((sparse - dense).astype(np.float64) ** 2).mean()
    assert first["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    pair = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (sparse, dense)]
    assert first["ssim"] == pytest.approx(ssim(*pair).mean().item(), abs=1e-5)
    assert psnr(*pair).shape == (FRAMES,)
    apart = [((a - b).norm() / b.norm()).item() for a, b in zip(trail, dense_trail, strict=True)]
    assert first["divergence"] == pytest.approx(apart, rel=1e-4)
    assert len(apart) == STEPS and apart[0] > 0

    for kind, expected in (("dense", dense), ("sparse", sparse)):
        shown, rate = frames_of(out / f"{kind}-000.mp4")
        assert rate == 8 and shown.shape == (FRAMES, 256, 256, 3)
        small = shown.reshape(FRAMES, SIDE, 16, SIDE, 16, 3).mean((2, 4, 5))
        assert np.abs(small - expected[..., 0]).mean() < 0.03
        with Image.open(out / f"{kind}-000.webp") as moving:
            assert moving.n_frames == FRAMES and moving.size == (256, 256) and moving.info["loop"] == 0
            for i in range(FRAMES):
                moving.seek(i)
                whole = np.asarray(moving.convert("RGB"), np.float32) / 255
                assert moving.info["duration"] == 125
                assert np.abs(whole.reshape(SIDE, 16, SIDE, 16, 3).mean((1, 3, 4)) - expected[i, ..., 0]).mean() < 0.03
    with Image.open(out / "comparison.webp") as beside:
        assert beside.n_frames == FRAMES and beside.width > 2 * 256
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4 and page.count("data:image/png;base64,") == 2
    assert "<polyline" in page and f"PSNR {first['psnr']:.1f} dB" in page
    assert f"{report['mean']['psnr']:.1f} dB" in printed and "s per video" in printed
    assert "blocks.0-1.attn1 (2)" in printed


def test_the_sheet_has_dense_above_sparse():
    from visattn.pipelines.report.video_files import contact_sheet

    dense, sparse = (np.full((3, 16, 16, 1), value, np.float32) for value in (0.2, 0.8))
    sheet = np.asarray(contact_sheet({"dense": dense, "sparse": sparse}).convert("L"))
    rows = [np.flatnonzero((sheet == value).sum(1) >= 3 * 64).min() for value in (51, 204)]
    assert rows[0] < rows[1]
    long = contact_sheet({"sparse": np.zeros((100, 16, 16, 3), np.float32)})
    assert long.width == 2 * 12 + 16 * 64 + 15 * 2
    assert contact_sheet({"sparse": np.zeros((2, 640, 320, 3), np.float32)}).width == 2 * 12 + 2 * 80 + 2


@pytest.mark.parametrize("shape", [(2, 15, 17, 3), (1, 300, 301, 1)])
def test_odd_sides_and_colors_survive_the_file(shape, tmp_path):
    from visattn.pipelines.report.video_files import write_mp4

    pixels = np.broadcast_to(np.linspace(0.2, 0.8, shape[2], dtype=np.float32)[:, None], shape)
    write_mp4(tmp_path / "a.mp4", pixels, 5)
    shown, rate = frames_of(tmp_path / "a.mp4")
    assert rate == 5 and len(shown) == shape[0]
    assert not shown.shape[1] % 2 and not shown.shape[2] % 2
    factor = max(1, 256 // min(shape[1:3]))
    assert shown.shape[1] - shape[1] * factor in (0, 1) and shown.shape[2] - shape[2] * factor in (0, 1)
    part = shown[:, : shape[1] * factor : factor, : shape[2] * factor : factor]
    assert np.abs(part - pixels).mean() < 0.03


def test_one_video_without_a_twin(generate, tmp_path):
    status, printed, _ = generate("--json", "--frames", 2, "--fps", 3, "--size", "8x16")
    assert status == 0
    report = json.loads(printed)
    assert report["videos"] == [{"index": 0, "seed": 0, "label": 0}]
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    shown, rate = frames_of(tmp_path / "out/sparse-000.mp4")
    assert shown.shape == (2, 256, 512, 3) and rate == 3
    assert report["attention"]["sites"][0]["grid"] == [2, 4, 8]
    Image.open(tmp_path / "out/sheet-000.png").verify()


def test_force_replaces_all_older_output(generate, tmp_path):
    out = tmp_path / "out"
    assert generate("--label", "1,2", "--compare", "--frames", 1)[0] == 0
    (out / "notes.txt").write_text("mine")
    assert generate("--frames", 1)[0] == 2
    assert generate("--frames", 1, "--force")[0] == 0
    assert {p.name for p in out.iterdir()} == FILES | {"notes.txt"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ("--prompt", "a cat"),
            "PixelWanPipeline takes class labels and no prompt: pass --label 3 instead of --prompt",
        ),
        (("--frames", "0"), "frames 0 must be at least 1"),
        (("--fps", "0"), "--fps 0 must be at least 1"),
        (("--size", "15"), "height 15 is not a multiple of the patch size 2: pass e.g. 16"),
        (("--pattern", "na(window=3x3)"), "PixelWanPipeline|3-D|3x"),
    ],
)
def test_bad_input(generate, tmp_path, args, text):
    status, printed, err = generate(*args)
    assert status == 2
    assert printed == ""
    assert any(part in err for part in text.split("|")), err
    assert not (tmp_path / "out").exists()


def test_image_and_video_models_are_not_mixed_up(run, model, tmp_path):
    status, _, err = run("--model", model, "--pattern", "dense", "--out", tmp_path / "out", kind="image")
    assert status == 2
    assert "PixelWanPipeline makes videos: use visattn generate video" in err
    status, _, err = run("--model", "digits", "--pattern", "dense", "--out", tmp_path / "out")
    assert status == 2
    assert "digits makes images: use visattn generate image" in err


def test_a_missing_encoder_is_said_before_a_model_is_loaded(generate, monkeypatch, tmp_path):
    import importlib.util

    from visattn.pipelines import load

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "av" else find(name, *more))
    monkeypatch.setattr(load, "load_pipeline", lambda *a, **k: pytest.fail("loaded a model"))
    status, _, err = generate()
    assert status == 2
    assert "videos need PyAV: pip install av, or pip install 'visattn[diffusers]'" in err
    assert not (tmp_path / "out").exists()


class TestLpips:
    def test_says_why_it_is_left_out(self, monkeypatch, tmp_path):
        from visattn.pipelines.report import lpips

        monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None)
        assert lpips.find_lpips() == (
            None,
            "left out: neither the package lpips nor torchmetrics is installed",
        )
        monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None if name == "torchvision" else name)
        assert lpips.find_lpips() == (
            None,
            "left out: the package torchvision, which has AlexNet, is not installed",
        )
        monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        metric, why = lpips.find_lpips()
        assert metric is None and "has no alexnet-owt-7be5be79.pth, and nothing is downloaded" in why

    @pytest.mark.parametrize("name", ["lpips", "torchmetrics"])
    def test_feeds_the_package_what_it_takes(self, name, monkeypatch, tmp_path):
        from types import ModuleType, SimpleNamespace

        from visattn.pipelines.report import lpips

        class Stand(torch.nn.Module):
            """Takes what the package takes, and returns a distance shaped like its own."""

            def forward(self, a, b, normalize):
                assert normalize and a.shape == b.shape and a.shape[1] == 3 and min(a.shape[2:]) >= 32
                return (a - b).abs().mean((1, 2, 3), keepdim=True)

        def from_lpips(net, verbose):
            assert net == "alex" and not verbose
            return Stand()

        def from_torchmetrics(net):
            assert net == "alex"
            return SimpleNamespace(net=Stand())

        package = ModuleType(name)
        package.LPIPS, package.LearnedPerceptualImagePatchSimilarity = from_lpips, from_torchmetrics
        monkeypatch.setitem(sys.modules, "lpips", package)
        monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", package)
        monkeypatch.setattr(
            lpips.importlib.util, "find_spec", lambda asked: asked if asked in (name, "torchvision") else None
        )
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").touch()
        metric, why = lpips.find_lpips()
        assert f"AlexNet, package {name}" in why
        a, b = torch.zeros(2, 1, 16, 20), torch.full((2, 1, 16, 20), 0.25)
        torch.testing.assert_close(metric(a, b), torch.tensor([0.25, 0.25]))
