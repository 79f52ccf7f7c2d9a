"""`visattn bench` and what it draws: every backend accounted for, numbers that belong together, refusals."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from visattn import Layout, backends, explain, plan
from visattn.bench import DENSE, SUITES, Case, backend_names, cases, run_case
from visattn.calls import time_calls
from visattn.chart import COLORS, Point, chart, duration
from visattn.dispatch import load
from visattn.patterns import parse
from visattn.problem import OtherKind, Support

# The quick backends: whole runs of all of them take a minute.
QUICK = ("sdpa", "reference")


@pytest.fixture
def run(command):
    return partial(command, "bench")


@pytest.mark.parametrize("backward", [False, True])
def test_every_backend_has_a_time_or_a_reason(backward):
    case = Case(pattern="na(window=3x3)", layout=Layout((8, 8), prefix=1), heads=2, dim=8, backward=backward)
    names = (*QUICK, "xformers", "triton")
    result = run_case(case, names, repeats=3)
    assert [line.backend for line in result.lines] == [DENSE, *names]
    dense = result.lines[0].timing
    for line in result.lines:
        if line.timing is None:
            assert line.reason
        else:
            assert len(line.timing.seconds) == 3
            assert line.speedup == pytest.approx(dense.median / line.timing.median)
    reference = next(line for line in result.lines if line.backend == "reference")
    assert reference.error < 1e-5
    assert result.density == plan(case.pattern, case.layout).density
    json.dumps(result.to_dict())


@pytest.mark.parametrize("measure", [run_case, time_calls])
def test_backends_that_refuse_are_asked_once(monkeypatch, measure):
    asked = []
    for name, reason in (("agent", OtherKind(False, "it runs others")), ("xformers", Support(False, "not this one"))):
        given = lambda problem, name=name, reason=reason: asked.append(name) or reason  # noqa: E731
        monkeypatch.setattr(load(name), "available", lambda: Support(True))
        monkeypatch.setattr(load(name), "supports", given)
    case = Case(pattern="na(window=3x3)", layout=Layout((8, 8)), heads=1, dim=8)
    # What "auto" takes is kept; this asks, too.
    explain(case.pattern, case.layout, torch.empty(1, 64, 1, 8))
    asked.clear()
    lines = {line.backend: line for line in measure(case, ("sdpa", "agent", "xformers"), repeats=1).lines}
    assert sorted(asked) == ["agent", "xformers"]
    assert lines["agent"].other and lines["agent"].reason == "it runs others"
    assert not lines["xformers"].other and lines["xformers"].reason == "not this one"


def test_auto_is_marked():

    case = Case(pattern="na(window=3x3)", layout=Layout((8, 8)), heads=2, dim=8)
    choice = explain(case.pattern, case.layout, torch.empty(1, 64, 2, 8)).choice
    result = run_case(case, (choice,), repeats=1)
    assert [line.chosen for line in result.lines] == [False, True]


def test_what_takes_too_long_is_measured_once_and_says_so():
    case = Case(pattern="dense", layout=Layout((8, 8)), heads=1, dim=8)
    result = run_case(case, ("sdpa",), repeats=3, patience=0.0)
    assert all(len(line.timing.seconds) == 1 for line in result.lines)
    assert all(line.reason == "over 0 s, so measured once" for line in result.lines)


def test_suites_name_patterns_that_exist():
    for pairs in SUITES.values():
        for pattern, grid in pairs:
            parse(pattern).check(grid)
    assert len(list(cases(["growth"], [], 0, 0))) == len(SUITES["growth"])
    assert backend_names("all") == tuple(name for name in backends() if name != "reference")


def test_the_command_prints_saves_and_draws(run, tmp_path):
    save, plot = tmp_path / "a.json", tmp_path / "a.png"
    args = (
        "na(window=3x3)",
        "--grid",
        "8x8,8x16",
        "--heads",
        2,
        "--head-dim",
        8,
        "--repeats",
        2,
        "--backend",
        "sdpa,xformers",
    )
    status, out, err = run(*args, "--save", save, "--plot", plot)
    assert status == 0, err
    assert "na(window=3x3) on 8x16, 128 tokens" in out
    assert "xformers cannot run it: " in out
    assert "[2/2] na(window=3x3) on 8x16" in err
    saved = json.loads(save.read_text())
    assert [r["case"]["layout"]["tokens"] for r in saved["results"]] == [64, 128]
    picture = np.asarray(Image.open(plot))
    assert (picture == COLORS[0]).all(-1).any()
    assert (picture == COLORS[1]).all(-1).any()
    status, out, err = run(*args, "--json")
    assert err == ""
    assert json.loads(out)["results"][0]["lines"][0]["backend"] == DENSE
    status, _, err = run(*args, "--save", save)
    assert status == 2
    assert "exists: pass --force" in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("na(3x3)",), "na(3x3) needs --grid, like --grid 64x64; suites have their own: small, image, video, growth"),
        (("small", "--grid", "8x8"), "suite 'small' has its own grids: leave --grid away"),
        (("smal",), "no suite is named 'smal': did you mean small?"),
        (("malla", "--grid", "8x8"), "unknown pattern 'malla' (did you mean 'mala'?)"),
        (("dense", "--grid", "8x8", "--backend", "sdpa,fast"), "unknown backend 'fast'"),
        (("dense", "--grid", "8x8", "--dtype", "int8"), "dtype 'int8' does not exist here: pass one of float32"),
        (("dense", "--grid", "8x8", "--heads", "0"), "batch 1, heads 0 and head dim 64 must be at least 1"),
        (("dense", "--grid", "8x8", "--device", "abacus"), "device 'abacus' cannot be used on this machine"),
        (("dense", "--grid", "8x8", "--save", "a.txt"), "a.txt must end in .json"),
        (("dense", "--grid", "8x8,4x"), "--grid '4x' must be 1 to 3 whole numbers"),
        (("na(window=3x3x3)", "--grid", "8x8"), "has 3 values but the grid has 2 axes"),
    ],
)
def test_bad_input(run, args, text):
    status, out, err = run(*args)
    assert status == 2
    assert out == ""
    assert text in err


def test_chart_places_points_on_logarithmic_axes():
    line = [Point(256, 1e-3, 1e-3, 1e-3), Point(4096, 1e-1, 1e-1, 1e-1), Point(1024, 1e-2, 1e-2, 1e-2)]
    pixels = np.asarray(chart("x", {"a": line}))[:, :660]
    rows, columns = np.nonzero((pixels == COLORS[0]).all(-1))
    middle = abs(columns - (columns.min() + columns.max()) / 2) < 2
    assert abs(rows[middle].mean() - (rows.min() + rows.max()) / 2) < 4  # 1024 tokens and 10 ms are both in the middle
    assert rows[columns == columns.min()].mean() > rows[columns == columns.max()].mean()
    with pytest.raises(ValueError, match="nothing was measured on x, so there is nothing to plot"):
        chart("x", {})


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.0, "2 s"), (0.0125, "12.5 ms"), (1e-4, "100 us"), (0.0009999, "1 ms"), (2e-8, "20 ns")]
)
def test_durations_are_readable(seconds, words):
    assert duration(seconds) == words
