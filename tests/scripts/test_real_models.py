"""The benchmark of real models: runs small ones on the CPU, merges files, and its table has every row."""

import json

import pytest
import torch

from scripts import figures_gpu
from scripts.bench import real_models, real_models_gpu

VERSIONS = {"gpu": "Some GPU", "torch": "2.0", "triton": "3.0", "diffusers": "0.1"}
ROW = {"model": "SDXL 1024", "attention": "dense", "mode": "eager", "stock_ms": 20.0, "ms": 10.0, "attention_ms": 15.0}


@pytest.mark.parametrize("name", ["Wan 480p"])
def test_small_models_are_measured_and_merged(name, tmp_path, monkeypatch):
    monkeypatch.setattr(real_models_gpu, "TURNS", (2, 2))
    monkeypatch.setattr(real_models_gpu, "TURN_S", 0.001)
    out = tmp_path / "real.json"
    out.write_text(json.dumps({"rows": [ROW, {**ROW, "model": name, "ms": -1.0}]}))
    assert real_models_gpu.main(["--tiny", "--models", name, "--modes", "eager", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {(row["model"], row["attention"]): row for row in found["rows"]}
    assert rows["SDXL 1024", "dense"] == ROW
    patterns = real_models.MODELS[name].patterns
    assert {attention for model, attention in rows if model == name} == {"dense", *patterns}
    mine = [row for (model, _), row in rows.items() if model == name]
    assert all(row["mode"] == "eager" and min(row["ms"], row["stock_ms"], row["attention_ms"]) > 0 for row in mine)
    ratios = [[a / b for a, b in zip(row["all_stock_ms"], row["all_ms"], strict=True)] for row in mine]
    assert all(len(each) == 2 and row["speedup"] == sum(each) / 2 for row, each in zip(mine, ratios, strict=True))
    assert all("2 of 2 attention modules" in rows[name, pattern]["report"] for pattern in patterns)
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"].endswith(f"--out {out}")


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
    (tmp_path / "h100-real-models.json").write_text(json.dumps({"rows": rows, "versions": VERSIONS}))
    *lines, _, machine = figures_gpu.gpu_real_table().splitlines()[2:]
    assert machine == "Some GPU, torch 2.0, triton 3.0, diffusers 0.1."
    assert lines == [
        "| SDXL 1024 | dense | 15 ms | 20 to 10 ms: 2.00x | 4.00x | 20 to 5 ms: 4.00x | 4.00x |",
        "| SDXL 1024 | `na(window=7x7)` | 15 ms | 20 to 10 ms: 2.00x | 4.00x |  |  |",
    ]
