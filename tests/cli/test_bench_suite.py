"""`visattn bench --suite`: one table, one plot, clear refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from visattn import suites
from visattn.suites import suite


@pytest.fixture
def small(monkeypatch):
    """Suites that take a moment."""
    monkeypatch.setattr(suites, "LINES", {"cpu": (256, 512), "cuda": (512,)})
    monkeypatch.setattr(suites, "IMAGES", {"cpu": ((8, 8), (16, 16)), "cuda": ((8, 8),)})
    monkeypatch.setattr(suites, "CLIPS", {"cpu": ((4, 8, 8),), "cuda": ((4, 8, 8),)})
    monkeypatch.setattr(suites, "SCALES", {"cpu": {"small": (1, 8), "large": (2, 16)}, "cuda": {"small": (1, 8)}})


def test_the_command_gives_one_table_and_one_plot(small, command, tmp_path):
    save, plot = tmp_path / "a.json", tmp_path / "a.png"
    words = ["--budget", 60, "--repeats", 1, "--backend", "sdpa,tiles,xformers,agent,gate", "--device", "cpu"]
    status, said, error = command("bench", "--suite", "cab", *words, "--save", save, "--plot", plot)
    assert status == 0, error
    assert "causal cross" in said and "256 x 64" in said and "xformers runs none" in said
    assert "for other patterns or calls: agent, gate" in said
    found = json.loads(save.read_text())["results"]
    assert len(found) == len(suite("cab", "cpu")) and all(each["lines"] for each in found)
    picture = np.asarray(Image.open(plot).convert("L"))
    assert picture.std() > 5 and min(picture.shape) > 600
    for wrong, what in (
        (["na(window=3)", "--suite", "cab"], "leave them"),
        ([], "pass a pattern with --grid"),
        (["--suite", "nosuch"], "pass one of longca, cab"),
        (["--suite", "cab", "--budget", 0], "--budget 0 must be above 0"),
    ):
        status, _, error = command("bench", *wrong)
        assert status == 2 and what in error, error
