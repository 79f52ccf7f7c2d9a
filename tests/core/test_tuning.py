"""The search for a schedule: ladders against brute force, journals that survive, goals on a model of numbers."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.numbers import COSTS, Numbers
from visattn import parse
from visattn.tuning.ages import of_stage, sharing
from visattn.tuning.candidates import candidates, checked, is_steady, kind_of
from visattn.tuning.journal import Journal
from visattn.tuning.layers import measured, promising
from visattn.tuning.measure import Measurer
from visattn.tuning.plan import Plan
from visattn.tuning.sensitivity import Response, floor_of, rank_correlation
from visattn.tuning.solve import Choice, hull, ladder
from visattn.tuning.subject import DENSE, Local

UNITS = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=4
)


class TestSolve:
    @settings(max_examples=30, deadline=None)
    @given(UNITS)
    def test_every_rung_is_the_optimum_for_its_time(self, units):
        made = [[Choice(str(i), float(t), float(x)) for i, (t, x) in enumerate(unit)] for unit in units]
        rungs = ladder(made)
        every = [(sum(c.time for c in some), sum(c.loss for c in some)) for some in itertools.product(*made)]
        for rung in rungs:
            assert rung.loss <= min(loss for time, loss in every if time <= rung.time + 1e-9) + 1e-9
        assert rungs[-1].loss == min(loss for _, loss in every)
        assert rungs[0].time == min(time for time, _ in every)
        assert all(a.time < b.time and a.loss > b.loss for a, b in itertools.pairwise(rungs))

    def test_what_is_dominated_is_not_on_a_hull(self):
        points = [
            Choice("a", 1, 8),
            Choice("b", 2, 7.9),
            Choice("c", 3, 2),
            Choice("slow", 5, 3),
            Choice("dense", 4, 0),
        ]
        assert [point.name for point in hull(points)] == ["a", "c", "dense"]


class TestSensitivity:
    @given(st.floats(1e-6, 1), st.floats(1e-6, 1))
    def test_it_goes_through_what_was_measured_and_never_falls(self, a, b):
        response = Response([(1e-3, 1e-4), (1e-1, 5e-3)])
        assert response(1e-3) == pytest.approx(1e-4) and response(1e-1) == pytest.approx(5e-3)
        assert (response(a) <= response(b) * (1 + 1e-9)) == (a <= b) or math.isclose(a, b, rel_tol=1e-6)
        assert response(0.0) == 0.0

    def test_rounding_is_no_response(self):
        # Any change moves the output by 1e-3, and a layer's error by its half.
        seen = {error: 1e-3 + error / 2 for error in (1e-4, 1e-2)}
        floor = floor_of((1e-4, seen[1e-4]), (1e-2, seen[1e-2]))
        assert floor == pytest.approx(1e-3)
        assert Response([(1e-2, seen[1e-2])], floor)(4e-3) == pytest.approx(2e-3)
        # Without rounding there is no floor; what is nothing but rounding is not free.
        assert floor_of((1e-4, 5e-5), (1e-2, 5e-3)) == pytest.approx(0.0, abs=1e-12)
        assert Response([(1e-2, 1e-3)], floor)(1e-2) == pytest.approx(1e-4)
        assert floor_of((1e-2, 1e-3), (1e-2, 1e-3)) == 0.0

    def test_rank_correlation(self):
        assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
        assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
        # scipy.stats.spearmanr gives the same with ties.
        assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
        assert rank_correlation([1], [1]) is None and rank_correlation([1, 1], [1, 2]) is None


class TestJournal:
    def test_what_was_measured_is_not_measured_again(self, tmp_path):
        path, calls = tmp_path / "j.jsonl", []
        for _ in range(2):
            journal = Journal(path, {"model": "a"})
            assert journal.get(["x", 1], lambda: calls.append(1) or {"y": [1.5, None]}) == {"y": [1.5, None]}
        assert len(calls) == 1

    def test_a_line_that_a_kill_cut_is_dropped(self, tmp_path):
        path = tmp_path / "j.jsonl"
        journal = Journal(path, {"model": "a"})
        journal.get("one", lambda: 1)
        whole = path.read_text()
        path.write_text(whole + '{"key": "\\"two\\"", "val')
        again = Journal(path, {"model": "a"})
        assert again.knows("one") and not again.knows("two")
        again.get("two", lambda: 2)
        assert Journal(path, {"model": "a"}).knows("two")

    def test_measurements_of_something_else_are_refused(self, tmp_path):
        Journal(tmp_path / "j.jsonl", {"model": "a", "grid": (1, 2)})
        with pytest.raises(ValueError, match="holds measurements of model 'a', not 'b'"):
            Journal(tmp_path / "j.jsonl", {"model": "b", "grid": (1, 2)})

    @pytest.mark.parametrize("text", ["my notes\n", "my notes", "[1]\n", '{"a": 1}\n', '{"key": "1", "value": 2}\n'])
    def test_a_file_of_something_else_is_refused_and_stays_as_it_is(self, tmp_path, text):
        path = tmp_path / "notes.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes.txt holds no measurements of a search: name another"):
            Journal(path, {"model": "a"})
        assert path.read_text() == text

    def test_a_kill_in_the_first_line_costs_nothing(self, tmp_path):
        path = tmp_path / "j.jsonl"
        Journal(path, {"model": "a"})
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            Journal(path, {"model": "a"}).get("one", lambda: 1)
            assert Journal(path, {"model": "a"}).knows("one")

    def test_a_line_that_is_none_is_passed_over(self, tmp_path):
        path = tmp_path / "j.jsonl"
        Journal(path, {"model": "a"}).get("one", lambda: 1)
        path.write_text(path.read_text() + '{"about": {"model": "a"}}\n\0\0\n')
        Journal(path, {"model": "a"}).get("two", lambda: 2)
        again = Journal(path, {"model": "a"})
        assert again.knows("one") and again.knows("two")


@pytest.mark.parametrize("grid", [(4096,), (64, 64), (16, 16, 16), (5, 30, 52), (7, 7)])
def test_candidates_are_patterns_of_the_grid(grid):
    found = candidates(grid)
    assert found[0] == DENSE and len(set(found)) == len(found) > 3
    for text in found:
        parse(text).check(grid)
        assert str(parse(text)) == text
    with pytest.raises(ValueError, match="parameters to train"):
        checked(["linear(feature=hedgehog)"], grid)


@pytest.mark.parametrize("grid", [(64, 64), (16, 16, 16)])
def test_candidates_that_steps_share_are_for_runs_of_several_steps(grid):
    shared = {steps: {name for name in candidates(grid, steps) if sharing(name)} for steps in (1, 2, 3, 6)}
    assert not shared[1] and {sharing(name).every for name in shared[2]} == {2}
    assert {sharing(name).every for name in shared[6]} == {2, 3, 4} and shared[2] < shared[3] < shared[6]
    assert {kind_of(name) for name in shared[6]} == {"residual of na", "residual of topk", "broadcast of dense"}
    assert all(map(is_steady, shared[6])) and not is_steady("residual(of=topp(p=0.9))")


class TestAges:
    @given(st.integers(2, 5), st.integers(2, 12), st.sampled_from(["residual(of=na(window=3), {})", "broadcast({})"]))
    def test_a_stage_is_the_sum_of_its_steps(self, every, steps, text):
        """Step by step: an error that grows with the age's square, a dense step and what runs beside it."""
        name = text.format(f"every={every}, drift=inf")
        own, dense, slope = 1.0, 10.0, 0.01
        refreshed = [i % every == 0 for i in range(steps)]
        if name.startswith("residual"):
            mean = own + dense / every
            taken = [own + dense * each for each in refreshed]
        else:
            mean, taken = dense / every, [dense * each for each in refreshed]
        period = slope * sum(i**2 for i in range(every)) / every
        found = of_stage({DENSE: Local(0, dense), name: Local(period, mean)}, steps)
        assert found[name].seconds == pytest.approx(sum(taken) / steps)
        assert found[name].error == pytest.approx(slope * sum((i % every) ** 2 for i in range(steps)) / steps)

    def test_a_stage_of_one_step_shares_nothing(self):
        here = {DENSE: Local(0, 1.0), "broadcast": Local(0.1, 0.5), "na(window=3)": Local(0.2, 0.3)}
        assert of_stage(here, 1) == {n: v for n, v in here.items() if n != "broadcast"}
        untimed = {DENSE: Local(0, 0.0), "broadcast": Local(0.1, 0.0)}
        assert of_stage(untimed, 3)["broadcast"].seconds == 0


@pytest.mark.parametrize("grid", [(64, 64), (16, 16, 16)])
def test_candidates_in_8_bits_have_dense_attention_among_them(grid):
    found = set(candidates(grid, 3, ("fp8",))) - set(candidates(grid, 3))
    assert found and all(name.endswith(" in fp8") for name in found)
    wide = "x".join(map(str, grid))
    assert any(name.startswith(f"na(window={wide},") for name in found)
    assert {kind_of(name) for name in found} == {"na in fp8", "topk in fp8"} and all(map(is_steady, found))
    assert checked(found, grid)[1:] == tuple(found)
    with pytest.raises(ValueError, match="8 bits are for patterns that list"):
        checked(["linear in fp8"], grid)


def test_what_no_layer_would_choose_is_measured_in_one_stage():
    slow = {DENSE: Local(0.0, 10.0), "a": Local(0.01, 6.0), "near": Local(0.012, 6.0), "far": Local(0.1, 6.0)}
    other = slow | {"far": Local(0.1, 1.0), "behind": Local(0.001, 11.0)}
    assert promising([slow], ("a", DENSE, "near", "far")) == ("a", DENSE, "near")
    assert promising([slow, other], (*slow, "behind")) == tuple(slow)
    calls, real = [], Numbers.local

    class Counted(Numbers):
        def local(self, step, names, seeds, timed):
            calls.append((step, set(names), set(timed)))
            return real(self, step, names, seeds, timed)

    # The middle stage first, with all; the times of topk and na depend on no values.
    names = (*COSTS, "topk(keep=0.4)")
    subject = Counted()
    subject.costs = COSTS | {"topk(keep=0.4)": (0.2, 7.0)}
    measurer = Measurer(subject, Plan(names, stages=2, seeds=4, quick=2), Journal(None, {}))
    found = measured(measurer)
    assert calls == [(6, set(names), set(names)), (2, set(COSTS), set())]
    assert all(set(each) == set(COSTS) for layer in found for each in layer)
