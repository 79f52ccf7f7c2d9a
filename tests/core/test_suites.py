"""Suites after LongCA-bench and CAB: every axis is there, causal is causal, a budget holds."""

import json

import pytest
import torch

from visattn import attention, dense_mask, suites
from visattn.bench import Case, Line, Result, run_case
from visattn.layout import Layout
from visattn.patterns import RoutedPattern, parse
from visattn.suites import Entry, Measured, run_suite, suite
from visattn.timing import Timing


@pytest.fixture
def small(monkeypatch):
    """Suites that take a moment."""
    monkeypatch.setattr(suites, "LINES", {"cpu": (256, 512), "cuda": (512,)})
    monkeypatch.setattr(suites, "IMAGES", {"cpu": ((8, 8), (16, 16)), "cuda": ((8, 8),)})
    monkeypatch.setattr(suites, "CLIPS", {"cpu": ((4, 8, 8),), "cuda": ((4, 8, 8),)})
    monkeypatch.setattr(suites, "SCALES", {"cpu": {"small": (1, 8), "large": (2, 16)}, "cuda": {"small": (1, 8)}})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_have_every_axis(device):
    line, grids = suite("longca", device), suite("cab", device)
    assert len({entry.case.layout.length for entry in line}) == len(suites.LINES[device])
    assert {entry.kind for entry in line} == {"noncausal self", "causal self"}
    assert {entry.kind for entry in grids} == {f"{a} {b}" for a in ("causal", "noncausal") for b in ("self", "cross")}
    assert all({entry.scale for entry in found} == {"small", "large"} for found in (line, grids))
    lengths = [entry.case.layout.length for entry in line]
    assert lengths == sorted(lengths) and len({(*e.key, e.case.layout) for e in grids}) == len(grids)
    with pytest.raises(ValueError, match="suite 'nosuch' does not exist: pass one of longca, cab"):
        suite("nosuch", device)


def test_causal_is_causal(small):
    """No query of a causal entry sees a key behind it, and full causal is torch's causal mask."""
    checked = 0
    for entry in suite("longca", "cpu") + suite("cab", "cpu"):
        layout, pattern = entry.case.layout, parse(entry.case.pattern)
        if isinstance(pattern, RoutedPattern):
            continue
        seen = dense_mask(pattern, layout)
        frame = layout.tokens // layout.grid[0] if layout.dims == 3 else 1
        of_key = layout.keys.tokens // layout.grid[0] if layout.dims == 3 else 1
        rows, columns = (torch.arange(n) for n in seen.shape)
        later = columns[None] // of_key > rows[:, None] // frame
        assert (not (seen & later).any()) == entry.causal or layout.dims == 2
        checked += entry.causal
        if entry.case.is_causal and entry.mask == "full":
            assert torch.equal(seen, torch.ones_like(seen).tril())
    assert checked > 5


def test_cross_cases_are_timed_and_right():
    case = Case(pattern="na(window=3x3)", layout=Layout((8, 8), key_layout=Layout((4, 4))), heads=2, dim=8)
    found = run_case(case, ("sdpa", "tiles", "reference"), repeats=1)
    assert all(line.timing is not None for line in found.lines[:2])
    errors = [line.error for line in found.lines if line.error is not None]
    assert errors and max(errors) < 1e-5
    assert found.to_dict()["case"]["layout"]["tokens"] == 64
    causal = Case(pattern="na(window=-1, causal=true)", layout=Layout(32), heads=1, dim=8)
    assert causal.is_causal and not case.is_causal
    q = torch.randn(1, 32, 1, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True)
    torch.testing.assert_close(attention(q, q, q, causal.pattern, causal.layout), whole.transpose(1, 2))


def test_what_was_measured_is_read_again(small):
    for entry in suite("cab", "cpu")[:10:3]:
        found = Measured(entry, run_case(entry.case, ("sdpa", "xformers"), repeats=1))
        again = Measured.of(json.loads(json.dumps(found.to_dict())))
        assert again == found and again.entry.products == entry.products
    assert Measured.of(Measured(entry, None).to_dict()) is None


def entries(lengths):
    return [
        Entry("full", False, False, "small", Case(pattern="dense", layout=Layout(n), heads=1, dim=8)) for n in lengths
    ]


def test_a_budget_holds():
    told = []
    found = run_suite(
        entries((8, 16)), ("reference",), budget=9, repeats=1, tell=lambda i, _: told.append(i), clock=lambda: 0
    )
    assert told == [1, 2] and all(each.result is not None for each in found)
    found = run_suite(entries((8, 16)), ("reference",), budget=1e9, repeats=1, patience=1e-9)
    assert found[1].result.lines[-1].reason == "a call would take more than 1e-09 s"
    with pytest.raises(ValueError, match="budget 0 must be seconds"):
        run_suite([], (), budget=0)


@pytest.mark.parametrize(("budget", "measured"), [(91.9, [True, False]), (92.1, [True, True])])
def test_what_a_longer_case_takes_is_told_before(monkeypatch, budget, measured):
    """Calls grow with the products, what compilers take does not."""
    now = [0.0]

    def took(case, names, **_):
        # Seven calls of each of two contenders take 12 seconds, what is beside them 16.
        now[0] += 28
        return Result(case, tuple(Line(name, Timing((6 / 7,))) for name in ("dense", *names)))

    monkeypatch.setattr(suites, "run_case", took)
    found = run_suite(entries((8, 16)), ("reference",), budget=budget, repeats=3, clock=lambda: now[0])
    assert [each.result is not None for each in found] == measured
    left = Measured(found[1].entry, None)
    assert left.to_dict()["reason"] == "the budget was over" and left.best is None
