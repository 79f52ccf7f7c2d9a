"""scripts.measure.heads and scripts.measure.guidance on a tiny model: files, going on, and refusals."""

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure import guidance, heads
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN, caption, split_of
from scripts.train.emoji_data import Picture
from scripts.train.emoji_sources import STYLES
from tests.support.tiny_emoji import EMOJI
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux

WORDS = ["--size", str(SIDE), "--steps", "1", "--prompts", "2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (guidance, heads):
        monkeypatch.setattr(module, "load_pipeline", lambda *_: tiny_pixel_flux())


def test_search_of_a_palette(tmp_path, capsys):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    given = ["--out", str(tmp_path / "a.jsonl"), *WORDS, "--seeds", "1", "--most", "1"]
    heads.main([*given, "--objective", "palette", "--examples", str(tmp_path / "red.png")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["finished"] and found["scale"] == 3.0 and found["objective"] == "palette"
    lines = (tmp_path / "a.jsonl").read_text()
    heads.main([*given, "--objective", "palette", "--examples", str(tmp_path / "red.png")])
    assert (tmp_path / "a.jsonl").read_text() == lines
    with pytest.raises(SystemExit, match="has scores of objective"):
        heads.main([*given, "--objective", "sharpness"])
    with pytest.raises(SystemExit, match="needs --examples"):
        heads.main([*given, "--objective", "palette"])


def test_heads_are_measured_on_captions_that_nobody_had(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        heads, "draw", lambda *given: asked.append(given[1:3]) or torch.rand(len(given[2]), 3, SIDE, SIDE)
    )
    batches = count()
    # The first candidate scores best; pictures without guidance are drawn last.
    monkeypatch.setattr(
        heads, "caption_objective", lambda *_: lambda pictures, _: torch.linspace(0, 0.1, len(pictures)) - next(batches)
    )
    given = ["--out", str(tmp_path / "a.jsonl"), *WORDS, "--seeds", "1", "--most", "1", "--scale", "1"]
    pictures = [
        Picture(each.code, each.base, style, split_of(each, style), caption(each, style), 1.0)
        for style in STYLES
        for each in EMOJI
    ]
    of = {each.caption: each.split for each in pictures}
    pack = SimpleNamespace(
        pictures=pictures, of=lambda *splits: torch.tensor([i for i, p in enumerate(pictures) if p.split in splits])
    )
    monkeypatch.setattr(heads, "load_pack", lambda *_: pack)
    heads.main([*given, "--data", "pack", "--held-out", "4"])
    found = json.loads((tmp_path / "a.json").read_text())
    rows = found["held_out"]
    assert list(rows) == ["no perturbation", "the middle layers", "1 head, drawn", "1 head, found"]
    assert rows["1 head, found"]["heads"] == found["heads"] and found["candidates"] == 2
    assert rows["no perturbation"]["gain"] == 0 != rows["the middle layers"]["gain"]
    assert [variant.scale for variant, _ in asked] == [0, 1, 1, 1]
    searched = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["settings"]["prompts"]
    for _, prompts in asked:
        assert len(prompts) == 4 and not set(prompts) & set(searched)
    assert {of[each] for each in asked[0][1]} <= {NEW_PAIR, NEW_EMOJI} and {of[each] for each in searched} == {TRAIN}


def test_rows_and_picture_of_guidance(tmp_path, monkeypatch):
    rows = [guidance.Variant(), guidance.Variant(4.5, 1.0, "blur", "na(window=3x3)")]
    monkeypatch.setattr(guidance, "variants", lambda pattern: rows[:1])
    given = ["--out", str(tmp_path / "a.json"), *WORDS]
    guidance.main(given)
    first = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(first) == ["unguided, dense"] and first["unguided, dense"]["pictures"] == 2
    monkeypatch.setattr(guidance, "variants", lambda pattern: rows)
    guidance.main(given)
    both = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert list(both) == ["unguided, dense", "guidance 4.5 + 1 x blur, na(window=3x3)"]
    assert both["unguided, dense"] == first["unguided, dense"]
    with pytest.raises(SystemExit, match=r"has rows of steps .*, not 2: pass another --out"):
        guidance.main([*given, "--steps", "2"])
    monkeypatch.setattr(guidance, "DRAWN", rows[:1] * 5)
    guidance.main(["--picture", str(tmp_path / "a.png"), *WORDS, "--pattern", "na(window=3x3)"])
    assert Image.open(tmp_path / "a.png").width == 2 * guidance.SHOWN + 4 + 16


def test_prompts_are_told_apart():
    assert len(set(guidance.PROMPTS)) == len(guidance.PROMPTS) == 40
    names = [str(each) for each in guidance.variants("na(window=3x3)")]
    assert len(set(names)) == len(names)
