"""Presets and their table are made of what was measured."""

import json
import shutil

import pytest

from scripts import figures_presets
from scripts.measure import preset_files
from scripts.measure.presets import SCHEDULES, digest
from scripts.results import RESULTS
from visattn.presets import FOLDER, Preset
from visattn.presets.place import spans_of
from visattn.staged import Span
from visattn.tuned import Tuned

PATH = SCHEDULES[1]
SINGLE = "broadcast(of=dense, drift=inf), 2 parts dense"


def row(turn, name, psnr, attention, steps=24, pattern=""):
    times = {"seconds": 2 * attention, "attention_seconds": attention, "ssim": []}
    where = {"turn": turn, "size": 256, "grid": [64, 64], "steps": steps}
    return {**where, "name": name, "bound": 30.0 * (name != "dense"), "pattern": pattern, "psnr": psnr, **times}


def report(*rows, known=None):
    # A file may have been called otherwise when it was measured.
    settings = {"model": "emoji", "dtype": "bfloat16", "schedules": {"mine": known or digest(Tuned.read(PATH))}}
    devices = [{"device": "cpu", "name": "EPYC"}, {"device": "cuda:0", "name": "H200"}]
    return {"settings": settings, "devices": devices, "rows": list(rows)}


GOOD, BAD = [30.0, 32.0, 33.0, 35.0], [31.0, 32.0, 29.0, 36.0]
ROWS = (
    row(0, "dense", [None] * 4, 0.010),
    row(0, "mine", GOOD, 0.005),
    row(0, "single-30", BAD, 0.008, pattern=SINGLE),
    row(1, "single-30", BAD, 0.008, pattern=SINGLE),
    row(1, "mine", GOOD, 0.007),
    row(1, "dense", [None] * 4, 0.010),
)


@pytest.fixture
def folder(tmp_path):
    """The schedules that were searched, and what was measured of one and of a single pattern."""
    for path in (*SCHEDULES, RESULTS / "tuned-emoji-384.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "presets-emoji-256.json").write_text(json.dumps(report(*ROWS, row(0, "mine", GOOD, 1.0, steps=3))))
    return tmp_path


def test_presets_are_what_was_verified_on_other_prompts(folder):
    made = preset_files.made(folder)
    assert list(made) == ["emoji-384-30", "emoji-384-single-30"]
    tuned, single = made.values()
    # A place without its dense twin is none.
    (place,) = tuned.verified["elsewhere"]
    assert (place["samples"], place["others"], place["psnr_held"], place["psnr_worst"]) == (4, 2, 33.0, 30.0)
    assert (place["attention_seconds"], place["attention_seconds_dense"], place["device"]) == (0.006, 0.010, "H200")
    assert tuned.layers == Tuned.read(PATH).layers
    # What its own prompts have says nothing.
    assert spans_of(Preset("a", tuned).places, 33.0) == [Span((64, 64), (64, 64), (24, 24))]
    assert {len(each) for each in single.layers.values()} == {2} and single.verified["elsewhere"][0][
        "psnr_held"
    ] == 29.0
    # Its figures where it was found are its own.
    assert single.verified["attention_seconds"] != tuned.verified["attention_seconds"]
    assert single.verified["samples"] == 20


def test_what_was_measured_of_a_schedule_that_has_changed_ships_as_none(folder):
    (folder / "presets-emoji-256.json").write_text(json.dumps(report(*ROWS, known="another")))
    assert list(preset_files.made(folder)) == ["emoji-384-single-30"]


def test_samples_that_equal_their_twins_are_above_any_bound():
    assert preset_files.level([None, 40.0]) == 40.0 and preset_files.level([None, None]) == 99.0
    assert preset_files.level([20.0, *[30.0] * 19]) == 30.0
    assert preset_files.quality([None, None])["psnr_mean"] == 99.0


def test_presets_are_those_of_the_results(tmp_path):
    (tmp_path / "old.json").write_text("of another search")
    preset_files.main(["--out", str(tmp_path)])
    files = sorted(path.name for path in FOLDER.glob("*.json"))
    assert files == sorted(path.name for path in tmp_path.iterdir())
    assert [(tmp_path / name).read_text() for name in files] == [(FOLDER / name).read_text() for name in files]


def test_the_table_has_a_row_for_each_place(folder, monkeypatch):
    monkeypatch.setattr(figures_presets, "RESULTS", folder)
    lines = figures_presets.presets_table().splitlines()
    assert lines[2:4] == [
        "| `emoji-384-30` | 64x64, 24 | 6.00 ms | 10.00 ms | 40% | **33.0**, 32.5, 30.0 dB | 2 of 2 | 2 of 2 |",
        f"| `emoji-384-single-30`: `{SINGLE}` | 64x64, 24 | 8.00 ms | 10.00 ms | 20% | **29.0**, 32.0, 29.0 dB "
        "| 2 of 2 | 1 of 2 |",
    ]
    assert lines[5] == "H200, bfloat16." and [line.split(": ")[0] for line in lines[7:]] == [
        f"- `auto(psnr={bound})`" for bound in (25, 30, 35)
    ]
    (folder / "presets-emoji-256.json").unlink()
    assert figures_presets.presets_table().startswith("Not measured.\n\n- `auto(psnr=25)`: ")
