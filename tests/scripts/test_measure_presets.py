"""scripts.measure.presets on a tiny model: rows of schedules and single patterns, going on, files that are refused."""

import json
import math

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure import presets
from tests.support.tiny_pixel_flux import tiny_pixel_flux
from visattn.tuned import Tuned

KNOWN = ["bus, gradient", "rocket, 3d"]


def schedule(folder, bound, pattern, **subject):
    stages = {"0-0.25": "dense", "0.25-": pattern}
    settings = {
        "goal": {"psnr": bound},
        "edges": [0.0, 0.25, 1.0],
        "subject": {"model": "emoji", "samples": {"prompts": KNOWN}} | subject,
    }
    path = folder / f"tiny-{bound:g}.json"
    Tuned("FluxTransformer2DModel", 2, (8, 8), {"0": stages, "1": stages}, settings=settings).write(path)
    return str(path)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "load_pipeline", lambda *_: tiny_pixel_flux())
    single = {"pattern": "na(window=5x5)", "dense_stages": 1}
    singles = {"bounds": {"20": {"single": single}, "60": {"single": {"pattern": "dense", "dense_stages": 0}}}}
    (tmp_path / "singles.json").write_text(json.dumps(singles))
    files = [schedule(tmp_path, 20.0, "na(window=3x3)"), schedule(tmp_path, 60.0, "na(window=7x7)")]
    words = ["--singles", str(tmp_path / "singles.json"), "--out", str(tmp_path / "out.json"), "--batch", "3"]
    return [*files, *words, "--count", "2", "--size", "64", "--threads", "1"]


def rows_of(tmp_path):
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def test_schedules_and_single_patterns_draw_the_same_samples(tmp_path, words, capsys):
    presets.main([*words, "--steps", "4"])
    first = rows_of(tmp_path)
    names = ["dense", "tiny-20", "tiny-60", "single-20"]
    assert [(row["turn"], row["name"]) for row in first] == [(0, n) for n in names] + [(1, n) for n in names[::-1]]
    assert all(row["grid"] == [16, 16] and len(row["psnr"]) == 4 and row["attention_seconds"] > 0 for row in first)
    # Windows keep their share of the axis: 3 of 8 are 7 of 16, and 7 of 8 are 15.
    dense, narrow, wide, single = first[:4]
    assert dense["psnr"] == [None] * 4 and all(map(math.isfinite, narrow["psnr"]))
    assert min(wide["psnr"]) > max(narrow["psnr"]) and min(single["psnr"]) > min(narrow["psnr"])
    assert single["pattern"] == "na(window=5x5), 1 part dense"
    assert presets.held(dense) == (2, 2) and presets.held({"bound": 3.0, "psnr": [2.0, 3.0, 4.0, 9.0]}) == (1, 2)
    for one, two in zip(first[:4], first[:3:-1], strict=True):
        assert one["psnr"] == two["psnr"]
    capsys.readouterr()
    # The same samples in other steps are added, what is there stays.
    presets.main([*words, "--steps", "4", "3"])
    assert rows_of(tmp_path)[:8] == first and len(rows_of(tmp_path)) == 16
    assert "64 px, 3 steps, tiny-20: attention" in capsys.readouterr().out.splitlines()[1]


def test_half_of_the_prompts_are_others():
    tuned = Tuned("A", 1, (8, 8), {"0": {"0-": "topk"}}, settings={"subject": {"samples": {"prompts": KNOWN}}})
    found = presets.prompts_of([tuned], 20)
    assert found[:20] == KNOWN * 10 and len(set(found)) == 22
    with pytest.raises(ValueError, match="--count 60: there are 38 other prompts"):
        presets.prompts_of([tuned], 60)


def test_what_ships_to_the_card_is_there():
    tuned = {path.stem: Tuned.read(path) for path in presets.SCHEDULES}
    singles = json.loads((presets.RESULTS / "tuned-emoji-384.json").read_text())["bounds"]
    names = [case.name for case in presets.cases(tuned, singles)]
    assert names == ["dense", *tuned, "single-25", "single-30"]
    assert len(presets.prompts_of(list(tuned.values()), 20)) == 40


def test_what_is_wrong_is_told(tmp_path, words):
    presets.main([*words, "--steps", "2", "--seconds", "1e-9"])
    assert not (tmp_path / "out.json").exists()
    presets.main([*words, "--steps", "2"])
    assert len(rows_of(tmp_path)) == 8
    schedule(tmp_path, 20.0, "na(window=5x5)")
    with pytest.raises(SystemExit, match=r"presets: .*has rows of schedules"):
        presets.main([*words, "--steps", "2"])
    schedule(tmp_path, 20.0, "na(window=5x5)", model="digits")
    with pytest.raises(SystemExit, match="are of digits, emoji: pass those of one model"):
        presets.main(words)
    schedule(tmp_path, 20.0, "na(window=5x5)", samples={"prompts": ["clock"]})
    with pytest.raises(SystemExit, match="schedules tuned with other prompts"):
        presets.main(words)


def test_what_cannot_run_keeps_nothing_else_from_being_measured(tmp_path, words):
    # One of four key blocks may be listed, and each query lists its own.
    schedule(tmp_path, 20.0, "topk(keep=0.15, block=8x16, key_block=8x8)")
    with pytest.raises(SystemExit, match=r"presets: 2 did not run: 64 px, 2 steps, tiny-20: topk.* more than the 1"):
        presets.main([*words, "--steps", "2"])
    assert [row["name"] for row in rows_of(tmp_path)].count("tiny-20") == 0 and len(rows_of(tmp_path)) == 6
