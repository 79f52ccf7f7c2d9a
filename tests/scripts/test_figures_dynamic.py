"""Tables of dynamic patterns, made from results."""

import json

import pytest

from scripts import figures_dynamic, results
from scripts.figures_dynamic import quality_table


def row(pattern, density, psnr=None, **more):
    kinds = {kind: {"top1": 0.5, "frechet": 0.25} for kind in ("seen", "unseen")}
    return {"pattern": pattern, "density": density} | kinds | ({} if psnr is None else {"psnr": psnr}) | more


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for module in (figures_dynamic, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_the_best_dynamic_and_static_pattern_of_each_density_are_bold(folder):
    rows = [
        row("dense", 1.0),
        row("topk(keep=0.2)", 0.21, 15.0),
        row("topk(keep=0.2,rest=mean)", 0.21, 19.5),
        row("na(window=29x29)", 0.19, 12.0),
        row("clear(radius=18)", 0.19, 12.5),
        row("topk(keep=0.1)", 0.11, 13.0),
        row("topk(keep=0.2)", 0.21, 25.0, dense_steps=6),
        {"pattern": "kmeans", "error": "no memory"},
    ]
    settings = {"device": "H200", "steps": 24, "dtype": "bfloat16"}
    (folder / "some.json").write_text(json.dumps({"settings": settings, "rows": dict(enumerate(rows))}))
    table = quality_table("some").splitlines()
    bold = [line.split("|")[1].strip() for line in table if "**" in line]
    assert bold == ["`topk(keep=0.1)`", "`topk(keep=0.2,rest=mean)`", "`clear(radius=18)`", "`topk(keep=0.2)`"]
    assert "| `topk(keep=0.2,rest=mean)` | 0 | 21.0% | **19.50** | 50% | 50% | 0.250 |" in table
    # There is no static pattern at a tenth, and no static one behind dense steps.
    assert "At 20% of the pairs the best dynamic pattern is 7.0 dB above the best static one." in table
    assert table[-3:] == ["H200, 24 steps, bfloat16.", "", "`kmeans` did not run: no memory."]


def test_what_was_not_measured_says_so(folder):
    assert quality_table("none") == "Not measured."
