"""The script that measures timm models on large images."""

import json

import pytest

pytest.importorskip("timm")


@pytest.fixture
def main(monkeypatch):
    from scripts.bench.timm_models import main

    return main


def test_parts_are_measured_apart_and_merged(main, tmp_path):
    out = tmp_path / "cases.json"
    given = ["--names", "test_vit", "--sizes", "96", "--pattern", "na(window=3)", "--threads", "1", "--out", str(out)]
    main([*given, "--parts", "time", "--repeats", "2", "--stock-repeats", "1"])
    main([*given, "--parts", "memory"])
    found = json.loads(out.read_text())
    case = found["cases"]["test_vit 96"]
    assert (case["tokens"], case["grid"], found["threads"]) == (37, [6, 6], 1) and case["density"] < 1
    for side, times in (("stock", 1), ("swapped", 2)):
        values = case[side]
        assert len(values["seconds"]) == len(values["attention"]) == times and "memory" in values
        assert all(seconds > 0 for seconds in (*values["attention"], *values["seconds"]))

    out.write_text(before := json.dumps(found | {"versions": found["versions"] | {"torch": "1.0"}}))
    with pytest.raises(SystemExit, match=r"has rows of torch '1\.0', not"):
        main([*given, "--parts", "memory"])
    assert out.read_text() == before


def test_seconds_of_dense_attention_are_those_of_all_its_calls(main):
    import torch
    from torch.nn import functional as F

    from scripts.bench.timm_models import dense_clock

    own = F.scaled_dot_product_attention
    q = torch.randn(1, 1, 4, 8)
    with dense_clock() as seconds:
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), own(q, q, q))
        F.scaled_dot_product_attention(q, q, q, scale=2.0)
    assert len(seconds) == 2 and F.scaled_dot_product_attention is own


def test_an_unknown_model_is_named(main):
    with pytest.raises(SystemExit, match="bench_timm: timm knows no model 'vit_huh'"):
        main(["--names", "vit_huh", "--sizes", "96"])


def test_moh_is_measured_with_and_without_unused_heads(main, tmp_path):
    from scripts.bench import moh as bench_moh

    bench_moh.main(["--names", "moh_vit_small_75", "--sides", "6", "--repeats", "1", "--out", str(tmp_path / "m.json")])
    (row,) = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert (row["tokens"], row["heads"], row["shared"], row["routed"]) == (36, 24, 4, 12)
    assert row["difference"] < 1e-4 and row["used"]["median"] > 0 and row["every"]["median"] > 0
