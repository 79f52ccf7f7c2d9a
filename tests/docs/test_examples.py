"""The programs in docs/examples, each from its command line to its files, with tiny models."""

import importlib.util
import re

import diffusers
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts.pages import ROOT
from tests.docs.run_page import tiny_pipeline, untrained

EXAMPLES = ROOT / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(tiny_pipeline))
    monkeypatch.setattr(timm, "create_model", untrained(timm.create_model))


def test_every_example_is_tested_and_listed():
    page = (EXAMPLES / "README.md").read_text()
    for name in (file.name for file in EXAMPLES.glob("*.py")):
        assert f"[{name}]({name})" in page and f"python docs/examples/{name}" in page
        assert f'example("{name.removesuffix(".py")}")' in (ROOT / "tests" / "docs" / "test_examples.py").read_text()


def test_flux(tiny, tmp_path, capsys):
    example("flux").main(["--steps", "3", "--dense-steps", "1", "--pattern", "na(window=3x3)", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    # Two runs of three steps, of which the first is dense.
    assert re.search(
        r"3 of 3 attention modules ran a pattern: 12 calls, density 0\.\d+, .* s\n  6 dense and 0 fallback", said
    )
    both = np.asarray(Image.open(tmp_path / "dense-and-sparse.png"))
    dense, sparse = np.split(both, 2, 1)
    assert dense.shape == (12, 16, 3) and (dense != sparse).any()


def test_wan(tiny, tmp_path, capsys):
    av = pytest.importorskip("av")
    out = tmp_path / "new" / "video.mp4"
    example("wan").main(["--steps", "4", "--dense-steps", "0.5", "--pattern", "na(window=3x3x3)", "--out", str(out)])
    said = capsys.readouterr().out
    assert "9 frames" in said
    # Two of four steps are dense, and the first of two layers; each step runs twice, with and without the prompt.
    assert re.search(
        r"1 of 2 attention modules ran a pattern: 4 calls, density 0\.\d+, .* s\n  12 dense and 0 fallback", said
    )
    with av.open(out) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9


@pytest.fixture
def pictures(tmp_path):
    # Bright and dark pictures with noise: even a tiny model learns that in a few steps.
    generator = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 8)):
        for name, value in (("bright", 200), ("dark", 40)):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-30, 30, (64, 64, 3))
                Image.fromarray((value + noise).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_timm_finetune(tiny, pictures, tmp_path, capsys):
    torch.manual_seed(0)
    out = tmp_path / "new" / "model.safetensors"
    arguments = f"--data {pictures} --model vit_tiny_patch16_224 --image-size 64 --pattern na(window=3x3) --batch 8 "
    arguments += f"--workers 0 --epochs 3 --lr 5e-4 --out {out}"
    example("timm_finetune").main(arguments.split())
    said = capsys.readouterr().out
    assert "2 of 2 attention modules ran a pattern" in said
    assert re.search(r"na\(window=3x3\) after 3 epochs: 100\.0%", said), said
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=64)
    stock.load_state_dict(load_file(out))
