"""The benchmark of real models: runs small ones on the CPU, merges files, and its table has every row."""

import json
import random

import pytest
import torch

from scripts import figures_gpu
from scripts.bench import real_models, real_models_gpu
from visattn import apply

VERSIONS = {"gpu": "Some GPU", "torch": "2.0", "triton": "3.0", "diffusers": "0.1"}
ROW = {"model": "SDXL 1024", "attention": "dense", "mode": "eager", "stock_ms": 20.0, "ms": 10.0, "attention_ms": 15.0}


@pytest.mark.parametrize("name", ["Wan 480p"])
def test_small_models_are_measured_and_merged(name, tmp_path, monkeypatch):
    monkeypatch.setattr(real_models_gpu, "TURNS", (2, 2))
    monkeypatch.setattr(real_models_gpu, "TURN_S", 0.001)
    out = tmp_path / "real.json"
    out.write_text(
        json.dumps({"rows": [ROW, {**ROW, "model": name, "ms": -1.0}], "versions": real_models_gpu.machine(True)})
    )
    assert real_models_gpu.main(["--tiny", "--models", name, "--modes", "eager", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {(row["model"], row["attention"]): row for row in found["rows"]}
    assert rows["SDXL 1024", "dense"] == ROW
    patterns = real_models.MODELS[name].patterns
    assert {attention for model, attention in rows if model == name} == {"dense", *patterns}
    mine = [row for (model, _), row in rows.items() if model == name]
    assert all(row["mode"] == "eager" and min(row["ms"], row["stock_ms"], row["attention_ms"]) > 0 for row in mine)
    for row in mine:
        low, high = row["speedup_95"]
        assert row["rounds"] == 2 and low <= row["speedup"] <= high and row["host_ratio"] > 0 < row["control"]
    assert all("2 of 2 attention modules" in rows[name, pattern]["report"] for pattern in patterns)
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].endswith(f"--out {out}")


def test_rows_of_another_gpu_are_refused_before_work(tmp_path):
    out = tmp_path / "real.json"
    out.write_text(before := json.dumps({"rows": [ROW], "versions": real_models_gpu.machine(True) | {"gpu": "Some"}}))
    with pytest.raises(SystemExit, match="has rows of device 'Some', not None"):
        real_models_gpu.main(["--tiny", "--out", str(out)])
    assert out.read_text() == before


def test_a_round_of_two_copies_is_their_mean():
    times = [("stock", [(1.0, 1.0), (3.0, 1.0)]), ("na", [(1.0, 2.0), (1.0, 2.0)])]
    times += [("na", [(3.0, 2.0), (3.0, 2.0)]), ("stock", [(3.0, 1.0), (5.0, 1.0)])]
    row = real_models_gpu.compared("na", times)
    assert (row["stock_ms"], row["ms"], row["speedup"], row["host_ratio"]) == (3.0, 2.0, 1.5, 2.0)
    assert row["control"] == (1 / 3 + 3 / 5) / 2


def test_contenders_share_the_weights_of_a_model():
    model, inputs = real_models.build(real_models.MODELS["Wan 480p"], "cpu", torch.float32, tiny=True)
    first, second = (each for _, each in real_models_gpu.copies(model, ["a", "b"], False))
    assert first is not second
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with apply(first, "na(window=3x3x3)") as handle:
        second(**inputs, return_dict=False)
        assert "0 calls" in str(handle.report())
    assert torch.equal(first(**inputs, return_dict=False)[0], second(**inputs, return_dict=False)[0])


def test_the_interval_of_a_median_holds_it_in_nineteen_of_twenty_samples():
    draw = random.Random(1)
    inside = 0
    for _ in range(1000):
        middle, (low, high) = real_models_gpu.median_of([draw.gauss(0, 1) for _ in range(101)])
        assert low <= middle <= high
        inside += low <= 0 <= high
    assert 930 <= inside <= 990


def test_no_model_begins_after_the_budget(tmp_path):
    out = tmp_path / "real.json"
    assert real_models_gpu.main(["--tiny", "--budget", "-1", "--out", str(out)]) == 0
    assert not out.exists()


def test_self_attention_of_a_step_is_counted_by_shape():
    model, inputs = real_models.build(real_models.MODELS["FLUX 64x64"], "cpu", torch.float32, tiny=True)
    found = real_models_gpu.attended(model, lambda: model(**inputs))
    shape = torch.Size([1, 512 + 64, 2, 16])
    assert found == {(shape, shape): 3}


def test_the_table_has_a_row_of_each_model_and_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_gpu, "RESULTS", tmp_path)
    monkeypatch.setattr("scripts.results.RESULTS", tmp_path)
    assert figures_gpu.gpu_real_table().startswith("Not measured")
    rows = [ROW, {**ROW, "mode": "compiled", "ms": 5.0}, {**ROW, "attention": "na(window=7x7)"}]
    (tmp_path / "h200-real-models.json").write_text(json.dumps({"rows": rows, "versions": VERSIONS}))
    *lines, _, machine = figures_gpu.gpu_real_table().splitlines()[2:]
    assert machine == "Some GPU, torch 2.0, triton 3.0, diffusers 0.1."
    assert lines == [
        "| SDXL 1024 | dense | 15 ms | 20 to 10 ms: 2.00x | 4.00x | 20 to 5 ms: 4.00x | 4.00x |",
        "| SDXL 1024 | `na(window=7x7)` | 15 ms | 20 to 10 ms: 2.00x | 4.00x |  |  |",
    ]
