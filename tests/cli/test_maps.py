"""`visattn maps`: a folder with a page that reads without scripts, for models of each library and recorded calls."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.browser import browse, browser, dom
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn import Layout, parse
from visattn.recorded import Recorded, save_recorded
from visattn.schedule import Schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("maps")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(draw.integers(0, 255, (40, 40, 3), np.uint8)).save(found / f"{name}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=7)
    save_file(model.state_dict(), found / "weights.safetensors")
    call = torch.randn(3, 1, 26, 2, 8, generator=torch.Generator().manual_seed(0))
    calls = [Recorded(f"layer.{i}", 2, 0, *(call + i), Layout((4, 6), 2), 0.3, None) for i in range(2)]
    save_recorded(found / "calls.safetensors", calls, {"model": "some"})
    return found


def test_a_model_of_images(command, folder):
    out = folder / "timm"
    words = [
        "timm:vit_tiny_patch16_224",
        folder / "a.png",
        folder / "b.png",
        "--size",
        96,
        "--layers",
        "3-4",
        "--importance",
        "pruning",
    ]
    words += ["--checkpoint", folder / "weights.safetensors", "--pattern", "na(window=3x3)", "--query", "cls"]
    status, said, error = command("maps", *words, "--mass", 0.2, "--out", out)
    assert status == 0, error
    assert "2 modules, 6 heads" in said and "heads bear na(window=3x3)" in said
    page = (out / "maps.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script src" not in page
    # Two modules, three heads: dense, sparse, their difference, who is read, and offsets of each.
    assert page.count("<figure data-head=") == 2 * 3 * 5 and page.count("<details open") == 2
    assert "average drop" in page and "rollout of the class token through 2 modules" in page
    found = json.loads((out / "maps.json").read_text())
    assert [site["site"] for site in found["sites"]] == ["blocks.3.attn", "blocks.4.attn"]
    assert len(found["sites"][0]["importance"]) == 3
    assert found["pruned"]["blocks.3.attn"].keys() == {"change", "cosine", "drop", "divergence"}
    assert found["pruned"]["blocks.3.attn"]["divergence"] == pytest.approx(found["sites"][0]["importance"], abs=1e-5)
    assert Schedule.of(out / "schedule.json").patterns
    assert parse((out / "candidates.txt").read_text().splitlines()[0]) == parse("na(window=3x3)")
    for name in ("heads", "caught", "similarity", "rollout", "rows-000", "read-001", "offsets-001"):
        picture = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert min(picture.shape) > 60 and picture.std() > 3, name
    status, _, error = command("maps", *words, "--out", out)
    assert status == 2 and "is not empty: pass --force" in error


def test_recorded_calls(command, folder):
    out = folder / "recorded"
    status, said, error = command("maps", folder / "calls.safetensors", "--step", 2, "--out", out, "--json")
    assert status == 0, error
    assert {"maps.html", "heads.png", "caught.png"} <= set(json.loads(said)["files"])
    status, _, error = command("maps", folder / "calls.safetensors", "--step", 1, "--out", folder / "none")
    assert status == 2 and "has no step 1: pass --step 2" in error


def test_a_model_of_transformers(command, folder):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "intermediate_size": 16, "image_size": 32, "patch_size": 8, "num_labels": 5}
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    out = folder / "transformers"
    status, said, error = command("maps", folder / "vit", folder / "a.png", "--out", out, "--pattern", "na(window=3x3)")
    assert status == 0, error
    assert "2 modules, 4 heads" in said
    found = json.loads((out / "maps.json").read_text())
    assert all(len(site["importance"]) == 2 and site["prefix"] == 1 for site in found["sites"])
    status, _, error = command("maps", folder / "vit", "--out", folder / "none")
    assert status == 2 and "looks at images" in error


def test_a_pipeline_whose_heads_differ_is_tuned_head_by_head(command, folder, monkeypatch):
    """Which heads bear which pattern: the candidates of `tune`, and what `apply` takes."""
    pytest.importorskip("diffusers")
    # The tiny model runs dense attention faster than anything else.
    monkeypatch.setattr("visattn.pipelines.tuning.local.HOPELESS", float("inf"))
    monkeypatch.setattr("visattn.tuning.layers.promising", lambda layers, names: names)
    tiny_pixel_flux(2).save_pretrained(folder / "pipeline")
    out, words = folder / "denoiser", ["--prompt", "a red apple, 3d", "--size", SIDE, "--steps", 2]
    patterns = ["--pattern", "na(window=3x3)", "--pattern", "na(window=5x5)"]
    # Between what the two heads of some module keep.
    status, said, error = command("maps", folder / "pipeline", *words, *patterns, "--out", out, "--importance", "none")
    assert status == 0, error
    sites = json.loads((out / "maps.json").read_text())["sites"]
    caught = max((site["caught"]["na(window=3x3)"] for site in sites), key=lambda heads: abs(heads[0] - heads[1]))
    mass = ["--mass", sum(caught) / 2]
    status, said, error = command("maps", folder / "pipeline", *words, *patterns, *mass, "--out", out, "--force")
    assert status == 0, error
    assert f"{len(sites)} modules, {2 * len(sites)} heads" in said
    candidates = (out / "candidates.txt").read_text().splitlines()
    own = [text for text in candidates if text.startswith("perhead")]
    schedule, places = json.loads((out / "schedule.json").read_text()), [text.split(" @ ") for text in own]
    assert own and any(text == schedule.get(site) for text, site in places)
    (out / "own.txt").write_text("\n".join(own))
    few = ["--stages", 1, "--seeds", 2, "--held-out", 1, "--batch", 2, "--psnr", 1]
    tuned = ["--candidates", out / "own.txt", "--out", folder / "tuned.json"]
    status, said, error = command("tune", "--model", folder / "pipeline", *words, *few, *tuned)
    assert status == 0, error
    lines = [json.loads(line) for line in (folder / "tuned.jsonl").read_text().splitlines()]
    (local,) = [line["value"] for line in lines if line.get("key", "").startswith('["local"')]
    for layer, found in zip(sites, local, strict=True):
        assert {name for name in found if name != "dense"} == {text for text, site in places if site == layer["site"]}
    tuned[1] = out / "wrong.txt"
    tuned[1].write_text(f"{places[0][0]} @ nosuch")
    status, _, error = command("tune", "--model", folder / "pipeline", *words, *few, *tuned, "--force")
    assert status == 2 and "is for 'nosuch', which is no layer here" in error


@browser
def test_the_page_in_a_browser(command, folder, tmp_path):
    out = folder / "shown"
    command("maps", folder / "calls.safetensors", "--step", 2, "--pattern", "na(window=3x3)", "--out", out)
    shot, lines = browse(out / "maps.html", tmp_path)
    assert not lines and shot.std() > 10
    script = """
        const wide = [...document.querySelectorAll('.columns')].map((row) =>
          [...row.children].map((each) => Math.round(each.getBoundingClientRect().width)));
        document.querySelector("a[href='#layer-1'][data-head]").dispatchEvent(new MouseEvent('click', {bubbles: true}));
        document.title = JSON.stringify({
          wide, open: [...document.querySelectorAll('details')].map((each) => each.open),
          page: document.documentElement.scrollWidth, view: innerWidth,
          marked: document.querySelectorAll('.on').length});"""
    found = dom(out / "maps.html", tmp_path, script)
    assert found["open"] == [False, True] and found["marked"] == 5
    assert found["page"] <= found["view"]
    assert all(len(set(row)) == 1 for row in found["wide"] if row and row[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["emoji", "--importance", "much"], "--importance 'much' must be one of"),
        (["emoji", "--mass", "0"], "--mass 0.0 must be"),
        (["emoji", "--steps", "2", "--step", "2"], "--step 2 must be from 0 to 1"),
        (["emoji", "--pattern", "nosuch"], "nosuch"),
        (["emoji", "--query", "x"], "--query 'x' must be"),
        (["timm:vit_tiny_patch16_224"], "looks at images"),
        (["emoji", "--pretrained"], "are for models of images"),
        (["timm:nosuch", "a.png"], "a.png does not exist"),
        (["timm:nosuch", "a.png", "--step", "3"], "is for pipelines"),
    ],
)
def test_what_cannot_be_is_told_before_work(command, tmp_path, words, said):
    status, _, error = command("maps", *words, "--out", tmp_path / "out")
    assert status == 2 and said in error and "\n" not in error.strip()
