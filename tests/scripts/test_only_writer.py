"""Scripts that add to what their files have: a second run of the same is refused before it does anything."""

import importlib

import pytest

from scripts import cli
from visattn.files import alone

# Of each script, its words, and what it writes.
RUNS = [
    ("tuned", ["--model", "animoji", "--out", "OUT"], "animoji.jsonl"),
    ("tuned_timm", ["--what", "digits", "--out", "OUT"], "digits.jsonl"),
    ("trained", ["emoji", "--runs", "OUT/runs", "--out", "OUT/a.json"], "runs"),
    ("trained", ["emoji", "--runs", "OUT/runs", "--out", "OUT/a.json"], "a.json"),
    ("emoji", ["--out", "OUT/a.json"], "a.json"),
    ("animoji", ["--out", "OUT/a.json"], "a.json"),
    ("dynamic_table", ["clips", "--out", "OUT/a.json"], "a.json"),
    ("presets", ["--out", "OUT/a.json", "OUT/schedule.json"], "a.json"),
    ("digits_vit", ["--out", "OUT/a.json"], "a.json"),
    ("distilled_vit", ["--checkpoint", "m", "--out", "OUT", "--result", "OUT/a.json"], "a.json"),
]


@pytest.mark.parametrize(("name", "words", "file"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_second_run_is_refused(tmp_path, monkeypatch, name, words, file):
    for package in ("diffusers", "transformers", "timm", "sklearn"):
        pytest.importorskip(package)
    module = importlib.import_module(f"scripts.measure.{name}")
    for work in ("measure", "run", "digits", "train"):
        if hasattr(module, work):
            monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("measured"))
    if file == "runs":
        (tmp_path / file).mkdir()
    with alone(tmp_path / file), pytest.raises(SystemExit, match=f"another run is writing to .*{file}: wait"):
        module.main([word.replace("OUT", str(tmp_path)) for word in words])


def test_the_model_that_is_missing_is_trained_by_one_run(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    from scripts.train import digits_vit

    monkeypatch.setattr(digits_vit, "run", lambda *_: pytest.fail("trained"))
    with cli.only_run(tmp_path), pytest.raises(ValueError, match="another run is writing to"):
        digits_vit.make_if_missing(tmp_path / digits_vit.FILE)
    with pytest.raises(ValueError, match=r"mine\.safetensors does not exist, and training makes model\.safetensors"):
        digits_vit.make_if_missing(tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").touch()
    digits_vit.make_if_missing(tmp_path / "mine.safetensors")
