"""Presets and their table are made of what was measured."""

import json

import pytest

from scripts import figures_presets
from scripts.measure import preset_files
from scripts.measure.presets import SCHEDULES, digest
from visattn.presets import FOLDER, Preset
from visattn.staged import Span
from visattn.tuned import Tuned

PATH = SCHEDULES[1]


def row(turn, name, psnr, attention, steps=24, pattern=""):
    times = {"seconds": 2 * attention, "attention_seconds": attention, "ssim": []}
    where = {"turn": turn, "size": 256, "grid": [64, 64], "steps": steps}
    return {**where, "name": name, "bound": 30.0 * (name != "dense"), "pattern": pattern, "psnr": psnr, **times}


def report(*rows, name=PATH.stem, known=None):
    settings = {"model": "emoji", "dtype": "bfloat16", "schedules": {name: known or digest(Tuned.read(PATH))}}
    devices = [{"device": "cpu", "name": "EPYC"}, {"device": "cuda:0", "name": "H200"}]
    return {"settings": settings, "devices": devices, "rows": list(rows)}


GOOD, BAD = [30.0, 32.0, 33.0, 35.0], [31.0, 32.0, 29.0, 36.0]
ROWS = (
    row(0, "dense", [None] * 4, 0.010),
    row(0, PATH.stem, GOOD, 0.005),
    row(0, "single-30", BAD, 0.008, pattern="topk, 1 part dense"),
    row(1, "single-30", BAD, 0.008, pattern="topk, 1 part dense"),
    row(1, PATH.stem, GOOD, 0.007),
    row(1, "dense", [None] * 4, 0.010),
)


@pytest.mark.parametrize(("psnr", "held"), [(GOOD, True), (BAD, False)])
def test_a_preset_has_the_places_where_it_was_verified(psnr, held):
    found = [each | {"psnr": psnr} if each["name"] == PATH.stem else each for each in ROWS]
    made = preset_files.preset(PATH, [report(*found), report(name="another")])
    (place,) = made.verified["elsewhere"]
    assert place["held"] == held and place["samples"] == 4 and place["device"] == "H200"
    assert place["attention_seconds"] == 0.006 and place["attention_seconds_dense"] == 0.010
    low = (64, 64) if held else (96, 96)
    assert Preset("emoji-30", made).span == Span(low, (96, 96), (12, 24 if held else 12))
    assert made.layers == Tuned.read(PATH).layers


def test_what_was_measured_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match="is not the schedule of this name that was measured"):
        preset_files.preset(PATH, [report(*ROWS, known="other")])


def test_presets_are_those_of_the_results(tmp_path):
    preset_files.main(["--out", str(tmp_path)])
    files = sorted(path.name for path in FOLDER.glob("*.json"))
    assert files == sorted(path.name for path in tmp_path.iterdir())
    assert [(tmp_path / name).read_text() for name in files] == [(FOLDER / name).read_text() for name in files]


def test_the_table_has_a_row_for_each_place(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_presets, "RESULTS", tmp_path)
    assert figures_presets.presets_table().startswith("Not measured elsewhere.\n\nTaken for: `emoji-25`: grid")
    (tmp_path / "presets-emoji-256.json").write_text(json.dumps(report(*ROWS, row(0, PATH.stem, GOOD, 1.0, steps=3))))
    lines = figures_presets.presets_table().splitlines()
    # A place without its dense twin is none.
    assert lines[2:4] == [
        "| `emoji-30` | 64x64, 24 | 6.00 ms | 10.00 ms | 40% | 32.5, 30.0 dB | 2 of 2 | 2 of 2 |",
        "| single pattern for 30 dB: `topk, 1 part dense` | 64x64, 24 | 8.00 ms | 10.00 ms | 20% | 32.0, 29.0 dB "
        "| 2 of 2 | 1 of 2 |",
    ]
    assert lines[5].startswith("H200, bfloat16. Taken for: `emoji-25`: ") and len(lines) == 6
