"""The search for a schedule: ladders against brute force, journals that survive, goals on a model of numbers."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.browser import browser, dom
from visattn import parse
from visattn.tuned import Tuned
from visattn.tuning.candidates import candidates, checked, is_steady, kind_of
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer, Plan, promising
from visattn.tuning.overhead import excess, overheads
from visattn.tuning.page import page
from visattn.tuning.search import Goal, Search, stages_of, tuned
from visattn.tuning.sensitivity import Response, floor_of, rank_correlation
from visattn.tuning.solve import Choice, hull, ladder
from visattn.tuning.subject import DENSE, Local, Outcome

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
    found = measurer.local()
    assert calls == [(6, set(names), set(names)), (2, set(COSTS), set())]
    assert all(set(each) == set(COSTS) for layer in found for each in layer)


COSTS = {DENSE: (0.0, 10.0), "topk(keep=0.5)": (0.01, 6.0), "topk(keep=0.2)": (0.1, 3.0), "na(window=3x3)": (0.5, 1.0)}


class Numbers:
    """A model whose output's error is a weighted sum of its layers' errors, with noise of the seed."""

    measure = "psnr"
    device = torch.device("cuda")
    model, layers, parameters, steps, grid = "Numbers", 3, 17, 8, (16, 16)
    costs = COSTS
    # The first layer in the first steps matters most.
    weights = ((0.3, 0.02), (0.03, 0.002), (0.003, 0.0002))

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = [], stop_after

    def about(self):
        return {"model": self.model}

    def local(self, step, names, seeds, timed):
        self._count("local")
        return [{name: Local(*self.costs[name]) for name in names} for _ in range(self.layers)]

    def outcome(self, edges, assignment, seeds, timed=True):
        self._count("outcome")
        error = sum(
            self.weights[layer][stage] * self.costs[name][0]
            for layer, row in enumerate(assignment)
            for stage, name in enumerate(row)
        )
        seconds = sum(self.costs[name][1] for row in assignment for name in row)
        noise = [1 + 0.2 * ((seed * 7919) % 11) / 10 for seed in seeds]
        psnr = tuple(-10 * math.log10(error * n) if error else math.inf for n in noise)
        return Outcome(psnr, (0.9,) * len(psnr), (), seconds, seconds)

    def _count(self, what):
        self.calls.append(what)
        if self.stop_after is not None and len(self.calls) > self.stop_after:
            raise KeyboardInterrupt


class Late(Numbers):
    """The same where a call with `topk` costs more in a whole run than alone."""

    beyond = 8.0

    def outcome(self, edges, assignment, seeds, timed=True):
        found = super().outcome(edges, assignment, seeds, timed)
        late = sum(self.beyond for row in assignment for name in row if name.startswith("topk"))
        return dataclasses.replace(found, attention_seconds=found.attention_seconds + late)


def search(goal, journal=None, subject=None, **more):
    subject = subject or Numbers()
    plan = Plan(tuple(COSTS), stages=2, seeds=4, quick=2, checks=6)
    return Search(Measurer(subject, plan, journal or Journal(None, {}), **more), goal)


class TestSearch:
    @pytest.mark.parametrize("psnr", [20.0, 25.0, 30.0, 40.0])
    def test_the_bound_holds_on_seeds_never_seen_and_less_does_not(self, psnr):
        made = search(Goal(psnr=psnr, margin=0.0, held_out=20))
        found = made.run()
        assert found.held and found.verified.held(0.95) >= psnr and found.complete
        assert found.ranks["injections"] > 0.8
        # Brute force over all schedules: none that holds is faster by more than one unit's last change.
        weights = [weight for row in Numbers.weights for weight in row]
        most = 10 ** (-psnr / 10) / 1.2
        times = [
            sum(time for _, time in some)
            for some in itertools.product(COSTS.values(), repeat=6)
            if sum(w * error for w, (error, _) in zip(weights, some, strict=True)) <= most
        ]
        assert found.verified.seconds <= min(times) + 4.0

    def test_a_speed_up_is_reached_with_the_least_error(self):
        found = search(Goal(speedup=2.0, held_out=4)).run()
        dense = 6 * COSTS[DENSE][1]
        assert dense / 2 - 5 <= found.verified.attention_seconds <= dense / 2
        assert found.assignment[2][1] != DENSE

    def test_a_bound_that_nothing_reaches_says_so(self):
        found = search(Goal(psnr=90.0, held_out=4)).run()
        assert "no schedule faster than dense has 90 dB" in found.missed and found.held
        assert all(name == DENSE for row in found.assignment for name in row)

    def test_a_search_that_was_stopped_goes_on_and_ends_alike(self, tmp_path):
        goal = Goal(psnr=25.0, held_out=5)
        whole = search(goal)
        expected = tuned(whole, whole.run()).to_dict()
        total = len(whole.measurer.subject.calls)
        path = tmp_path / "j.jsonl"
        spent = 0
        for limit in (3, 20, 1000):
            subject = Numbers(limit)
            made = search(goal, Journal(path, {}), subject)
            try:
                found = tuned(made, made.run()).to_dict()
                spent += len(subject.calls)
            except KeyboardInterrupt:
                spent += len(subject.calls) - 1
        assert found == expected and spent == total

    def test_minutes_end_with_the_best_so_far(self, monkeypatch):
        clock = itertools.count()
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        made = search(Goal(psnr=25.0, held_out=5), deadline=21)
        found = made.run()
        assert not found.complete and found.held
        # The dense twin is measured all the same.
        made.measurer.deadline = 0
        assert tuned(made, found).verified["seconds_dense"] > 0
        with pytest.raises(ValueError, match="before anything could be predicted"):
            search(Goal(psnr=25.0), deadline=-1).run()

    def test_the_file_says_what_was_verified(self, tmp_path):
        made = search(Goal(psnr=25.0, held_out=5))
        found = made.run()
        tuned(made, found).write(tmp_path / "tuned.json")
        read = Tuned.read(tmp_path / "tuned.json")
        assert read.verified["psnr_worst"] >= 25 and read.verified["samples"] == 5 and read.verified["held"]
        assert read.verified["attention_seconds"] < read.verified["attention_seconds_dense"]
        assert json.loads((tmp_path / "tuned.json").read_text())["settings"]["goal"]["psnr"] == 25
        text = page(read, found)
        assert text.count("<circle") >= 2 and text.count("<rect") >= 3 and "NaN" not in text

    def test_what_a_call_costs_in_a_whole_run_is_counted(self):
        late = Late()
        made = search(Goal(psnr=25.0, margin=0.0, held_out=20), subject=late)
        found, plain = made.run(), search(Goal(psnr=25.0, margin=0.0, held_out=20)).run()
        # In every call of `topk` the device waits for longer than it saves.
        assert {name for row in found.assignment for name in row} <= {DENSE, "na(window=3x3)"}
        assert "topk(keep=0.5)" in {name for row in plain.assignment for name in row}
        used = overheads(made.measurer, made.measurer.local())
        assert used == {"topk": pytest.approx(Late.beyond), "na": pytest.approx(0.0, abs=1e-9)}
        assert overheads(search(Goal(psnr=25.0), deadline=-1).measurer, made.measurer.local()) == {}
        late.device = torch.device("cpu")
        assert overheads(made.measurer, made.measurer.local()) == {}

    def test_a_kind_that_is_worse_in_whole_runs_than_predicted_is_charged(self):
        class Worse(Numbers):
            """The same where whole runs of `na` have ten times the error that its calls say."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                names = {name for row in assignment for name in row}
                return dataclasses.replace(
                    found, psnr=tuple(p - 10 * (names == {"na(window=3x3)"}) for p in found.psnr)
                )

        used = []
        for subject in (Numbers(), Worse()):
            measurer = search(Goal(psnr=25.0), subject=subject).measurer
            # Small errors, of which no sample becomes another one.
            subject.costs = {name: (error / 1000, time) for name, (error, time) in COSTS.items()}
            local = measurer.local()
            used.append(excess(measurer, local, measurer.responses(local)[0]))
        assert used[0] == {"topk": pytest.approx(1.0, rel=0.05), "na": pytest.approx(1.0, rel=0.05)}
        assert used[1] == {"topk": 1.0, "na": pytest.approx(10.0, rel=0.05)}

    def test_one_of_the_goals(self):
        for goal in (Goal(), Goal(psnr=30.0, speedup=2.0)):
            with pytest.raises(ValueError, match="either the least PSNR, the most accuracy"):
                search(goal)


def test_neighbouring_stages_with_one_pattern_are_one():
    edges = (0.0, 0.25, 0.5, 1.0)
    assert stages_of(edges, ("dense", "dense", "topk")) == {"0-0.5": "dense", "0.5-1": "topk"}
    assert stages_of(edges, ("topk",) * 3) == {"0-": "topk"}


def test_held_is_what_the_share_has():
    outcome = Outcome(tuple(float(i) for i in range(20)))
    assert (outcome.held(1.0), outcome.held(0.95), outcome.held(0.5)) == (0.0, 1.0, 10.0)
    assert Outcome.of(json.loads(json.dumps(Outcome((math.inf, 1.0)).to_dict()))) == Outcome((math.inf, 1.0))


@browser
def test_a_real_browser_draws_the_page(tmp_path):
    made = search(Goal(psnr=25.0, held_out=5))
    found = made.run()
    file = tmp_path / "tuned.html"
    file.write_text(page(tuned(made, found), found), encoding="utf-8")
    seen = dom(
        file,
        tmp_path,
        """const boxes = [...document.querySelectorAll("rect")].map(r => r.getBoundingClientRect());
        const dots = [...document.querySelectorAll("circle")].map(c => c.getBoundingClientRect());
        const wide = document.documentElement.clientWidth;
        document.title = JSON.stringify({
          rows: new Set(boxes.map(b => Math.round(b.top))).size,
          inside: [...boxes, ...dots].every(b => b.width > 1 && b.height > 1 && b.left >= 0 && b.right <= wide),
          dots: dots.length,
          scrolls: document.documentElement.scrollWidth > wide,
        });""",
    )
    assert seen == {"rows": 3, "inside": True, "dots": seen["dots"], "scrolls": False} and seen["dots"] >= 2
