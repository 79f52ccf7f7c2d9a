"""Tables of trained methods, made from results."""

import json

import pytest

from scripts import figures_trained, results
from scripts.figures_trained import closed, trained_table, trained_tables


def row(pattern, weights, top1, frechet, **more):
    kinds = {name: {"top1": top1, "frechet": frechet, "flicker": 0.01} for name in ("seen", "unseen")}
    return {"pattern": pattern, "weights": weights, "seconds": 0.05, "attention_seconds": 0.004} | kinds | more


@pytest.fixture
def measured(tmp_path, monkeypatch):
    for module in (figures_trained, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    rows = [
        row("dense", "shipped", 0.8, 0.06, density=1.0),
        row("vsa(keep=0.05)", "shipped", 0.2, 0.56, density=0.05, psnr=10.0),
        row("vsa(keep=0.05)", "vsa-95", 0.74, 0.11, density=0.05, psnr=15.5),
        row("vsa(keep=0.05)", "vsa-96", 0.74, 0.11, density=0.05, psnr=15.5),
    ]
    told = {"pattern": "vsa(keep=0.05)", "sparsity": 0.95, "seconds": 150.0, "steps": 900, "megabytes": 6.5}
    trained = {
        "vsa-95": told,
        "vsa-96": told | {"sparsity": 0.96, "after": "vsa-90", "device": "a card"},
        "sla-95": {"error": "out of memory"},
        "vsa-97": told | {"pattern": "vsa(keep=0.03)"},
    }
    settings = {"device": "cpu", "dtype": "float32", "steps": 24, "captions": 60}
    found = {"rows": dict(enumerate(rows)), "trained": trained, "settings": settings}
    (tmp_path / "trained-animoji.json").write_text(json.dumps(found))


def test_before_and_after(measured):
    assert list(trained_tables()) == ["trained-animoji"]
    lines = trained_table("animoji").splitlines()
    assert lines[2] == "| dense (teacher) | 100 % | 80% | 80% | 0.060 |  | 2.6 | 4.0 ms | 50.0 ms |  |  |"
    top = "20% to 74% (90%)"
    assert lines[3] == (
        f"| `vsa(keep=0.05)` | 5.0% | {top} | {top} | 0.560 to 0.110 (90%) | 10.0 to 15.5 dB | 2.6 to 2.6 | 4.0 ms | "
        "50.0 ms | 2.5 min, 900 steps | 6.5 MB |"
    )
    assert "60 captions of each kind, 24 steps, float32, on cpu; times of a clip." in lines
    assert "`sla-95`: out of memory." in lines
    assert lines[4].endswith("| 2.5 min, 900 steps, after `vsa-90`, on a card | 6.5 MB |")
    assert "`vsa-97`: not measured, the budget was over." in lines


def test_times_are_those_of_the_pattern_where_a_student_has_none(measured, tmp_path):
    found = json.loads((tmp_path / "trained-animoji.json").read_text())
    found["rows"]["1"] |= {"attention_seconds": 0.007}
    found["rows"]["2"] |= {"seconds": None, "attention_seconds": None}
    (tmp_path / "trained-animoji.json").write_text(json.dumps(found))
    assert " | 7.0 ms | 50.0 ms | 2.5 min" in trained_table("animoji").splitlines()[3]


def test_pictures_do_not_flicker(measured, tmp_path):
    found = json.loads((tmp_path / "trained-animoji.json").read_text())
    for each in found["rows"].values():
        for name in ("seen", "unseen"):
            del each[name]["flicker"]
    (tmp_path / "trained-emoji.json").write_text(json.dumps(found))
    lines = trained_table("emoji").splitlines()
    assert lines[2] == "| dense (teacher) | 100 % | 80% | 80% | 0.060 |  | 4.0 ms | 50.0 ms |  |  |"
    assert "60 captions of each kind, 24 steps, float32, on cpu; times of a picture." in lines


def test_no_gap_no_share():
    assert closed(0.79, 0.8, 0.8) == ""
    assert closed(0.4, 0.6, 0.8) == " (50%)"


def test_compiled_steps(tmp_path, monkeypatch):
    for module in (figures_trained, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    cases = {
        "sla(keep=0.05) in fp8": {"model_ms": 2000.0, "times_dense": 3.25},
        "vsa(keep=0.05)": {"failed": "RuntimeError: no"},
    }
    (tmp_path / "h200-step.json").write_text(json.dumps({"cases": cases}))
    assert list(trained_tables()) == ["trained-steps"]
    lines = trained_tables()["trained-steps"]().splitlines()
    assert lines[2:] == ["| `sla(keep=0.05)` in `fp8` | 2.00 s | 6.50 s | 3.25x |"]
