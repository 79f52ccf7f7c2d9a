"""What the measuring of dynamic patterns says of made-up calls whose attention is known."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from scripts.measure import dynamic_mass
from scripts.measure.dynamic_mass import BEST, BEST_OF_HEAD, KEEPS, Module, Point, main, measure
from visattn import Layout


def module(layout, seed=0, heads=2):
    """Queries and keys that differ from block to block of 8x8, so that there is something to choose."""
    made = torch.Generator().manual_seed(seed)
    height, width = layout.grid
    tensors = []
    for _ in range(3):
        level = torch.randn(height // 8, width // 8, heads, 8, generator=made)
        level = level.repeat_interleave(8, 0).repeat_interleave(8, 1).flatten(0, 1)
        grid = level + 0.3 * torch.randn(layout.tokens, heads, 8, generator=made)
        text = torch.randn(layout.prefix, heads, 8, generator=made)
        tensors.append(torch.cat([text, grid])[None])
    return Module("site", *tensors, layout, 8**-0.5)


def test_masses_of_lines_are_shares_and_nothing_beats_the_best(monkeypatch):
    monkeypatch.setattr(dynamic_mass, "STATIC", {"na": ["na(window=8x8, stride=8x8)", "na(window=32x32)"]})
    monkeypatch.setattr(dynamic_mass, "ORDERED", {"kmeans": ["kmeans(queries=4, keys=8, p=0.5, floor=0.0, start=3)"]})
    monkeypatch.setattr(dynamic_mass, "HEADS", {"best": ["best(of=[na(window=16x16, stride=8x8), na(window=-1x3)])"]})
    lines = measure([module(Layout((32, 32), 3)), module(Layout((32, 32), 3), 1)])
    for points in lines.values():
        assert all(0 < p.density <= 1 and 0 < p.mass <= 1 + 1e-6 for p in points)
    assert lines["na"][-1] == Point(1.0, pytest.approx(1.0, abs=1e-5))
    for i, keep in enumerate(KEEPS):
        assert keep <= lines[BEST][i].density < keep + 1 / 16
        assert lines["topk, mean"][i].mass <= lines[BEST][i].mass + 1e-6
        assert lines["topk per head, mean"][i].mass <= lines[BEST_OF_HEAD][i].mass + 1e-6
        assert lines[BEST][i].density <= lines[BEST_OF_HEAD][i].density + 1 / 16
    assert lines["topk, mean"][2].mass > lines["na"][0].mass


def test_writes_result_and_chart(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_mass, "DYNAMIC", {"topk": ["topk(keep=0.2)", "topk(keep=0.5)"]})
    monkeypatch.setattr(dynamic_mass, "STATIC", {"na": ["na(window=16x16, stride=8x8)"]})
    monkeypatch.setattr(dynamic_mass, "OUTPUTS", ["topk(keep=1.0)", "topk(keep=0.2)", "topk(keep=0.2, rest=mean)"])
    out, chart = tmp_path / "mass.json", tmp_path / "mass.svg"
    asked = []

    def recorded(*given):
        asked.append(given)
        return [module(Layout((32, 32), 3))]

    result = main(["--out", str(out), "--chart", str(chart), "--prompt", "a cat, flat"], recorded)
    assert asked == [("a cat, flat", 0, 12, 4)]
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    errors = {text: value["error"] for text, value in result["outputs"].items()}
    assert errors["topk(keep=1.0)"] < 1e-5 < errors["topk(keep=0.2, rest=mean)"] < errors["topk(keep=0.2)"]
    texts = [element.text for element in ElementTree.parse(chart).iter() if element.tag.endswith("text")]
    assert {"topk", "na", BEST, BEST_OF_HEAD} <= set(texts)
    with pytest.raises(SystemExit, match="--step 12 must be from 1 to 11"):
        main(["--out", str(out), "--step", "12"], recorded)
