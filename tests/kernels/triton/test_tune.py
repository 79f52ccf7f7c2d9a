"""Opt-in tuning of the Triton backend, without a GPU: the choice and its file."""

import json

import pytest
import torch

from visattn import Layout, parse
from visattn.files import add_values
from visattn.kernels.triton import tune
from visattn.kernels.triton.config import DIRECTIONS, Config, config

pytest.importorskip("triton")


def test_candidates_start_with_the_table():
    for direction in DIRECTIONS:
        found = tune.candidates(90, torch.bfloat16, 128, direction)
        assert found[0] == config(90, torch.bfloat16, 128, direction)
        assert len(found) == len(set(found)) > 5
        assert all(c.per_step == 1 or c.tile % 32 == 0 for c in found)


def test_takes_the_fastest_that_launches():
    times = {16: 3.0, 32: 1.0, 64: 2.0}

    def time(choice):
        if choice.rows == 32:
            raise RuntimeError("out of resource: shared memory")
        return times[choice.rows]

    assert tune.fastest([Config(r, 16, 4, 1) for r in times], time).rows == 64


def test_nothing_launches():
    def time(choice):
        raise RuntimeError("out of resource")

    with pytest.raises(RuntimeError, match=r"no Triton configuration could be launched.*out of resource"):
        tune.fastest([Config(16, 16, 4, 1)], time)


def test_remembers_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr("visattn.kernels.triton.backend.architecture", lambda _: 90)
    asked = []

    def timer(*problem):
        asked.append(problem[5])
        return lambda choice: float(choice.rows != 64)

    monkeypatch.setattr(tune, "timer", timer)
    problem = parse("na(window=7)"), Layout(100), torch.bfloat16, 64, torch.device("cuda", 0)
    first = tune.tuned(*problem)
    assert asked == list(DIRECTIONS) and all(c.rows == 64 for c in first.values())
    assert tune.tuned(*problem) == first and asked == list(DIRECTIONS)
    stored = json.loads((tmp_path / "triton.json").read_text())
    assert len(stored) == len(DIRECTIONS) and all("some GPU" in key for key in stored)
    tune.tuned(problem[0], Layout(200), *problem[2:])
    assert len(json.loads((tmp_path / "triton.json").read_text())) == 2 * len(DIRECTIONS)


def test_a_broken_file_is_written_anew(monkeypatch, tmp_path):
    path = tmp_path / "triton.json"
    path.write_text("{ not json")
    add_values(path, {"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]}


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_is_opt_in(monkeypatch, value, on):
    monkeypatch.setenv("VISATTN_AUTOTUNE", value)
    assert tune.enabled() is on
