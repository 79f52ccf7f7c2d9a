"""scripts.measure.inversion on a tiny model: errors of the way back, going on where it was stopped, the picture."""

import json

import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts.measure import inversion
from tests.support.tiny_pixel_flux import tiny_pixel_flux

CASES = [
    {"kind": "EDICT 0.93", "pattern": "na(window=3x3)", "back": "na(window=3x3)", "guidance": 2.0},
    {"kind": "BDIA 0.92", "pattern": "dense", "back": "na(window=3x3)", "guidance": 1.0},
    {"kind": inversion.EULER, "pattern": "dense", "back": "dense", "guidance": 1.0},
]


def test_round_trips(tmp_path, monkeypatch):
    monkeypatch.setattr(inversion, "load_pipeline", lambda *_: tiny_pixel_flux())
    monkeypatch.setattr(inversion, "cases", lambda: CASES[:1])
    file, words = tmp_path / "a.json", ["--steps", "3", "--size", "32"]
    inversion.main(["--out", str(file), *words])
    first = json.loads(file.read_text())["rows"]
    monkeypatch.setattr(inversion, "cases", lambda: CASES)
    inversion.main(["--out", str(file), *words])
    rows = json.loads(file.read_text())["rows"]
    assert rows[:1] == first and len(rows) == 3
    # The same attention finds its noise, other attention does not, nor do Euler steps.
    assert rows[0]["error"] < 5e-12 and rows[1]["error"] > 1e-6 and rows[2]["error"] > 1e-4
    with pytest.raises(SystemExit, match="has rows of steps 3, not 4: pass another --out"):
        inversion.main(["--out", str(file), "--steps", "4", "--size", "32"])
    monkeypatch.setattr(inversion, "DRAWN", (1.0,))
    inversion.main(["--picture", str(tmp_path / "a.png"), *words])
    assert Image.open(tmp_path / "a.png").width > 4 * inversion.SHOWN
