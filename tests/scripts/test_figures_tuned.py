"""The table and the chart of tuned schedules, made from results."""

import json
import xml.etree.ElementTree as ET

import pytest

from scripts import figures_tuned
from scripts.figures_tuned import draw, timm_table, tuned_table

TIMES = {kind: {"attention_seconds": value / 1e3} for kind, value in (("tuned", 6), ("single", 10), ("dense", 12))}
BOUND = {
    "times": TIMES,
    "verified": {"psnr_mean": 27.03, "psnr_worst": 25.2, "samples": 20},
    "held_in": 20,
    "single": {"pattern": "topk", "dense_stages": 1},
    "tried": [{"attention_seconds": 0.006, "held": 25.5}, {"attention_seconds": 0.012, "held": None}],
}
FOUND = {
    "about": {"model": "emoji", "grid": [64, 64], "device": "H200", "dtype": "bfloat16", "steps": 24},
    "bounds": {"25": BOUND, "30": {"error": "the minutes were over"}},
    "grid": [{"pattern": "topk", "psnr": [22.0, 24.0], "attention_seconds": 0.01}, {"pattern": "na", "error": "no"}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_tuned, "RESULTS", tmp_path)
    return tmp_path


def test_each_bound_that_was_measured_is_a_row(folder):
    assert tuned_table() == "Not measured."
    (folder / "tuned-emoji.json").write_text(json.dumps(FOUND))
    lines = tuned_table().splitlines()
    cells = "| emoji, 64x64 | 25 dB | **6.00 ms** | 10.00 ms: `topk`, 1 part dense | 12.00 ms | 40% | 27.0, 25.2 dB |"
    assert lines[2] == f"{cells} 20 of 20 |" and len(lines) == 5
    assert lines[-1] == "`tuned-emoji`: H200, bfloat16, 24 steps, best of 2 single patterns."


def test_what_is_no_faster_is_none_percent(folder):
    times = {kind: {"attention_seconds": value} for kind, value in (("tuned", 1.002), ("single", 1.1), ("dense", 1.0))}
    (folder / "tuned-emoji.json").write_text(json.dumps(FOUND | {"bounds": {"25": BOUND | {"times": times}}}))
    assert "| 1000.00 ms | 0% |" in tuned_table()


def test_models_of_timm_have_a_row_each(folder):
    assert timm_table() == "Not measured."
    times = {"attention_seconds": 0.0015, "attention_seconds_dense": 0.002, "samples": 9}
    found = {
        "about": {"model": "vit", "grid": [16, 16], "device": "CPU", "dtype": "float32"},
        "goal": "loses at most 0.5 points of accuracy",
        "layers": {"0": {"0-": "dense"}, "1": {"0-": "topk"}},
        "verified": times | {"accuracy_lost": 0.25, "accuracy_dense": 0.9, "snr_mean": 20.0, "snr_worst": 10.0},
    }
    (folder / "timm-tuned-a.json").write_text(json.dumps(found))
    features = found | {"verified": times | {"snr_mean": 20.0, "snr_worst": 10.0}}
    (folder / "timm-tuned-b.json").write_text(json.dumps(features))
    lost, kept = timm_table().splitlines()[2:]
    times = "loses at most 0.5 points of accuracy | 1 of 2 | 1.50 ms | 2.00 ms | 25% |"
    assert lost == f"| vit, 16x16 | CPU, float32 | {times} +0.25 points of 90.0%, 9 pictures |"
    assert kept == f"| vit, 16x16 | CPU, float32 | {times} 20.0, 10.0 dB, 9 pictures |"


def test_the_chart_has_a_dot_for_each_schedule(tmp_path):
    draw(FOUND, tmp_path / "pictures" / "tuned-emoji.svg")
    dots = [each for each in ET.parse(tmp_path / "pictures" / "tuned-emoji.svg").iter() if each.tag.endswith("circle")]
    assert len(dots) == 2
    tuned, single = dots
    assert float(tuned.get("cx")) < float(single.get("cx")) and float(tuned.get("cy")) < float(single.get("cy"))
