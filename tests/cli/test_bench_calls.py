"""`visattn bench --calls`: times of a call, and from how many tokens on a pattern pays."""

import json
import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visattn import Layout
from visattn.bench import Case
from visattn.calls import overtaking, sweep, time_calls


@pytest.fixture
def run(command):
    return partial(command, "bench")


def test_every_backend_has_times_or_a_reason():
    case = Case(pattern="na(window=3x3)", layout=Layout((8, 8)), heads=1, dim=8)
    result = time_calls(case, ("sdpa", "tiles", "triton"), repeats=1)
    lines = {line.backend: line for line in result.lines}
    assert list(lines) == ["dense", "sdpa", "tiles", "triton"]
    assert all(lines[name].wall > 0 and lines[name].host > 0 for name in ("dense", "sdpa", "tiles"))
    assert lines["triton"].wall is None and lines["triton"].reason
    assert all(line.gpu is None for line in result.lines)
    assert [name for name, line in lines.items() if line.chosen] == ["sdpa"]


def test_a_crossing_lies_where_both_times_are_powers_of_the_tokens():
    dense = {n: 1e-9 * n**2 for n in (100, 1000, 10000)}
    sparse = {n: 1e-6 * n for n in dense}
    assert overtaking(dense, sparse) == 1000
    assert overtaking({n: t for n, t in dense.items() if n != 1000}, sparse) == 1000
    assert overtaking(dense, {n: t / 2 for n, t in dense.items()}) == 100
    assert overtaking(dense, {n: t * 2 for n, t in dense.items()}) is None
    assert overtaking({}, sparse) is None


@given(st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0)), min_size=2, max_size=6))
def test_a_crossing_is_between_the_last_slower_size_and_the_next(times):
    sizes = [4**i for i in range(len(times))]
    dense, sparse = ({n: t[i] for n, t in zip(sizes, times, strict=True)} for i in (0, 1))
    found = overtaking(dense, sparse)
    slower = [n for n in sizes if sparse[n] >= dense[n]]
    if sizes[-1] in slower:
        assert found is None
    elif not slower:
        assert found == sizes[0]
    else:
        assert slower[-1] <= found <= 4 * slower[-1]


def test_a_sweep_has_the_axes_of_its_patterns():
    assert {len(grid) for grid in sweep(["na(window=3x3x3)"])} == {len(sweep(["radial(decay=0.5)"])[0])} == {3}
    assert sweep(["na(window=7)", "clear(radius=4)"])[0] == (16, 16)
    assert all(math.prod(grid) % 64 == 0 for grid in sweep(["routing(regions=8x8, topk=4)"]))


def test_the_command_prints_times_and_crossings(run, tmp_path):
    save = tmp_path / "calls.json"
    args = ("na(window=3x3)", "--calls", "--grid", "4x4,8x8", "--heads", 1, "--head-dim", 8, "--repeats", 1)
    status, out, err = run(*args, "--backend", "sdpa,xformers", "--save", save, "--plot", tmp_path / "calls.png")
    assert status == 0, err
    assert "na(window=3x3) on 8x8, 64 tokens" in out and "xformers cannot run it: " in out
    assert "host" in out and "wall" in out
    assert "na(window=3x3), sdpa " in out
    saved = json.loads(save.read_text())
    assert [len(result["lines"]) for result in saved["results"]] == [3, 3]
    assert saved["results"][0]["lines"][0]["wall"] > 0


@pytest.mark.parametrize("args", [("dense", "--calls", "--grid", "8x8", "--dtype", "int8"), ("no", "--calls")])
def test_bad_input_is_refused_before_anything_is_timed(run, args):
    status, out, _ = run(*args)
    assert status == 2
    assert out == ""
