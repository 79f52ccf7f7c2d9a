"""The search of a tuned schedule, on a subject made of numbers: what it finds, what it measures, how it goes on."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from tests.support.browser import browser, dom
from tests.support.numbers import COSTS, Late, Numbers
from visattn.tuned import Tuned
from visattn.tuning.budget import estimated, fitted
from visattn.tuning.candidates import candidates
from visattn.tuning.found import tuned
from visattn.tuning.goal import Goal
from visattn.tuning.injections import Injections
from visattn.tuning.journal import Journal
from visattn.tuning.layers import measured
from visattn.tuning.measure import Measurer
from visattn.tuning.overhead import excess, overheads
from visattn.tuning.page import page
from visattn.tuning.plan import Plan, stages_of
from visattn.tuning.search import Search
from visattn.tuning.subject import DENSE, Outcome


def search(goal, journal=None, subject=None, **more):
    subject = subject or Numbers()
    plan = Plan(tuple(COSTS), stages=2, seeds=4, quick=2, checks=6)
    return Search(Measurer(subject, plan, journal or Journal(None, {}), **more), goal)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"psnr": 30.0}, "has 30 dB in 95% of the samples"),
        ({"accuracy": 0.5}, "loses at most 0.5 points of accuracy"),
        ({"speedup": 2.0}, "makes attention 2 times faster"),
    ],
)
def test_a_goal_in_words(given, said):
    assert str(Goal(**given)) == said


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

    def test_where_early_errors_turn_samples_into_others_the_first_steps_are_dense(self):
        class Turning(Numbers):
            """The same where any error of the first stage makes another sample of every fourth."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                early = any(row[0] != DENSE for row in assignment)
                psnr = tuple(min(p, 12.0) if early and not s % 4 else p for p, s in zip(found.psnr, seeds, strict=True))
                return dataclasses.replace(found, psnr=psnr)

        # The samples of injections are none of those.
        plan = Plan(tuple(COSTS), stages=2, seeds=8, quick=2, checks=6, seed=1)
        goal = Goal(psnr=25.0, margin=0.0, held_out=20)
        found = Search(Measurer(Turning(), plan, Journal(None, {})), goal).run()
        assert found.held and {row[0] for row in found.assignment} == {DENSE}
        # The rest is as sparse as the bound allows.
        best = Search(Measurer(Numbers(), plan, Journal(None, {})), goal)
        best.run()
        rest = next(r for r in best.ladders[1] if best.tries.holds(r))
        assert found.verified.seconds == pytest.approx(rest.time / 4, rel=0.02)

    @pytest.mark.parametrize(("dense", "psnr"), [(0, 13.0), (1, 20.0)])
    def test_nothing_of_one_candidate_for_all_that_holds_is_faster(self, dense, psnr):
        class Mixed(Numbers):
            """The same where candidates beside others make more error, and any in a first stage to be dense."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                kinds = {name for row in assignment for name in row[dense:]}
                off = 15.0 * (len(kinds) > 1 or any(set(row[:dense]) - {DENSE} for row in assignment))
                return dataclasses.replace(found, psnr=tuple(p - off for p in found.psnr))

        goal = Goal(psnr=psnr, margin=0.0, held_out=20)
        found = search(goal, subject=Mixed()).run()
        times = []
        for first, name in itertools.product(range(2), COSTS):
            assignment = ((DENSE,) * first + (name,) * (2 - first),) * 3
            seen = Mixed().outcome((), assignment, range(20))
            times += [seen.attention_seconds] if seen.held(goal.share) >= goal.psnr else []
        assert found.held and found.verified.attention_seconds <= min(times) < 60
        assert {name for row in found.assignment for name in row[dense:]} == {"topk(keep=0.2)"}

    def test_what_whole_runs_of_one_candidate_took_counts_more_than_what_is_predicted(self):
        class Quick(Numbers):
            """The same where whole runs of `topk(keep=0.5)` alone take no time at all."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                quick = {name for row in assignment for name in row} == {"topk(keep=0.5)"}
                return dataclasses.replace(found, attention_seconds=1.0) if quick else found

        found = search(Goal(psnr=20.0, held_out=5), subject=Quick()).run()
        assert found.held and found.assignment == (("topk(keep=0.5)",) * 2,) * 3

    def test_a_schedule_that_never_verifies_is_told_with_its_own_figures(self):
        class Unlucky(Numbers):
            """The same where what is held out is far off, but for dense attention."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                return dataclasses.replace(found, psnr=tuple(p - 3 * (min(seeds) > 999) for p in found.psnr))

        found = search(Goal(psnr=20.0, margin=0.0, held_out=5, rounds=1), subject=Unlucky()).run()
        assert not found.held and found.verified.seconds == sum(COSTS[n][1] for row in found.assignment for n in row)

    def test_candidates_of_some_layers_of_a_group_are_chosen(self):
        class Placed(Numbers):
            """The same where the last layer alone has candidates."""

            def local(self, step, names, seeds, timed):
                *rest, last = super().local(step, names, seeds, timed)
                return [*({DENSE: each[DENSE]} for each in rest), last]

        for groups in (1, 3):
            plan = Plan(tuple(COSTS), stages=2, groups=groups, seeds=4, quick=2, checks=6)
            made = Search(Measurer(Placed(), plan, Journal(None, {})), Goal(psnr=30.0, margin=0.0, held_out=5))
            found = made.run()
            assert found.held and {name for row in found.assignment[:2] for name in row} == {DENSE}
            assert DENSE not in found.assignment[2]
            known = [json.loads(key) for key in made.measurer.journal._known]
            assert all(row == [DENSE] * 2 for key in known if key[0] == "quality" for row in key[1][:2])

    def test_stages_are_as_long_as_those_before_them_where_the_steps_allow_it(self):
        assert Plan((DENSE,), stages=4, steps=24).edges == (0.0, 0.125, 0.25, 0.5, 1.0)
        assert Plan((DENSE,), stages=4, steps=4).edges == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert Plan((DENSE,), stages=1, steps=1).edges == (0.0, 1.0) == Plan((DENSE,), stages=1).edges

    def test_without_candidates_dense_attention_is_what_is_found(self):
        made = Search(
            Measurer(Numbers(), Plan((DENSE,), stages=2, seeds=4, quick=2), Journal(None, {})), Goal(psnr=25.0)
        )
        found = made.run()
        assert found.held and "no candidate is faster than dense attention here" in found.missed

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
        expected = tuned(whole.measurer, goal, whole.run()).to_dict()
        total = len(whole.measurer.subject.calls)
        path = tmp_path / "j.jsonl"
        spent = 0
        for limit in (3, 20, 1000):
            subject = Numbers(limit)
            made = search(goal, Journal(path, {}), subject)
            try:
                found = tuned(made.measurer, goal, made.run()).to_dict()
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
        assert tuned(made.measurer, made.goal, found).verified["seconds_dense"] > 0
        with pytest.raises(ValueError, match="before anything could be predicted"):
            search(Goal(psnr=25.0), deadline=-1).run()

    def test_minutes_end_a_search_whose_schedules_do_not_verify(self, monkeypatch):
        clock = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: clock[0])

        class Late(Numbers):
            """The same where the time is over with the first samples held out, which are far off."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                late = min(seeds) > 999
                clock[0] += late
                return dataclasses.replace(found, psnr=tuple(p - 6 * late for p in found.psnr))

        found = search(Goal(psnr=20.0, margin=0.0, held_out=5), subject=Late(), deadline=0.5).run()
        whole = search(Goal(psnr=20.0, margin=0.0, held_out=5), subject=Late()).run()
        assert not found.complete and whole.complete
        assert len(found.tried) < len(whole.tried)

    def test_the_file_says_what_was_verified(self, tmp_path):
        made = search(Goal(psnr=25.0, held_out=5))
        found = made.run()
        tuned(made.measurer, made.goal, found).write(tmp_path / "tuned.json")
        read = Tuned.read(tmp_path / "tuned.json")
        assert read.verified["psnr_worst"] >= 25 and read.verified["samples"] == 5 and read.verified["held"]
        assert read.verified["attention_seconds"] < read.verified["attention_seconds_dense"]
        assert json.loads((tmp_path / "tuned.json").read_text())["settings"]["goal"]["psnr"] == 25
        text = page(read, found)
        assert text.count("<circle") >= 2 and text.count("<rect") >= 3 and "NaN" not in text

    def test_where_the_minutes_are_over_other_searches_of_the_journal_count(self):
        journal = Journal(None, {})
        whole = search(Goal(psnr=25.0, held_out=5), journal).run()
        late = search(Goal(psnr=20.0, held_out=5), journal)
        # What is known is no work; whatever this bound alone would measure is.
        late.measurer.deadline = 0
        found = late.run()
        assert not found.complete and found.held
        assert found.verified.attention_seconds <= whole.verified.attention_seconds < Numbers.costs[DENSE][1] * 6
        held = [row for row in whole.tried if row["held"] and row["held"] >= 21]
        assert found.verified.attention_seconds == min(row["attention_seconds"] for row in held)

    def test_what_a_call_costs_in_a_whole_run_is_counted(self):
        late = Late()
        made = search(Goal(psnr=25.0, margin=0.0, held_out=20), subject=late)
        found, plain = made.run(), search(Goal(psnr=25.0, margin=0.0, held_out=20)).run()
        # In every call of `topk` the device waits for longer than it saves.
        assert {name for row in found.assignment for name in row} <= {DENSE, "na(window=3x3)"}
        assert "topk(keep=0.5)" in {name for row in plain.assignment for name in row}
        used = overheads(made.measurer, measured(made.measurer))
        assert used == {"topk": pytest.approx(Late.beyond), "na": pytest.approx(0.0, abs=1e-9)}
        assert overheads(search(Goal(psnr=25.0), deadline=-1).measurer, measured(made.measurer)) == {}
        late.device = torch.device("cpu")
        assert overheads(made.measurer, measured(made.measurer)) == {}

    def test_a_kind_that_is_worse_in_whole_runs_than_predicted_is_charged(self):
        class Worse(Numbers):
            """The same where whole runs of `na` have ten times the error that its calls say."""

            def outcome(self, edges, assignment, seeds, timed=True):
                found = super().outcome(edges, assignment, seeds, timed)
                whole = {name for row in assignment for name in row} == {"na(window=3x3)"}
                return dataclasses.replace(found, psnr=tuple(p - 10 * whole for p in found.psnr))

        used = []
        for subject in (Numbers(), Worse()):
            measurer = search(Goal(psnr=25.0), subject=subject).measurer
            # Small errors, of which no sample becomes another one.
            subject.costs = {name: (error / 1000, time) for name, (error, time) in COSTS.items()}
            local = measured(measurer)
            used.append(excess(measurer, local, Injections(measurer, local)))
        assert used[0] == {"topk": pytest.approx(1.0, rel=0.05), "na": pytest.approx(1.0, rel=0.05)}
        assert used[1] == {"topk": 1.0, "na": pytest.approx(10.0, rel=0.05)}

    def test_minutes_measure_less_where_samples_are_slow(self, monkeypatch):
        clock = itertools.count(0, 240)
        monkeypatch.setattr("time.perf_counter", lambda: next(clock))
        plan = Plan(candidates((64, 64)), stages=2, seeds=8, quick=4)
        made = Measurer(Numbers(), plan, Journal(None, {}))
        # Four samples take four minutes.
        whole = estimated(plan, 60.0, 8, 20)
        found = [fitted(made, whole * share, 20) for share in (1.01, 0.75, 0.6, 0.01)]
        assert found[0] == plan and found[1].probes == 1 and found[1].candidates == plan.candidates
        sizes = [estimated(each, 60.0, 8, 20) for each in found]
        assert sizes == sorted(sizes, reverse=True) and sizes[1] <= 0.75 * whole and sizes[2] <= 0.6 * whole
        assert found[3].groups == 2 and found[3].candidates[0] == DENSE and 5 <= len(found[3].candidates) <= 10
        late = Measurer(Numbers(), plan, Journal(None, {}), -1.0)
        monkeypatch.setattr("time.monotonic", lambda: 0.0)
        with pytest.raises(ValueError, match="before a dense sample was drawn: give more"):
            fitted(late, 1.0, 20)
        few = Measurer(Numbers(), Plan(tuple(COSTS), stages=2, seeds=8, quick=4), Journal(None, {}))
        assert fitted(few, 1.0, 20).candidates == tuple(COSTS)

    def test_more_minutes_measure_more_candidates_with_the_same_journal(self):
        journal, few = Journal(None, {}), tuple(COSTS)[:2]
        for names in (few, tuple(COSTS)):
            measurer = Measurer(Numbers(), Plan(names, stages=2, seeds=4, quick=2), journal)
            assert set(measured(measurer)[0][0]) == set(names)

    def test_one_of_the_goals(self):
        for goal, given in (
            (Goal(), "psnr=None, speedup=None"),
            (Goal(psnr=30.0, speedup=2.0), "psnr=30.0, speedup=2.0"),
        ):
            with pytest.raises(ValueError, match=f"{given} and accuracy=None: pass one, the least PSNR"):
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
    file.write_text(page(tuned(made.measurer, made.goal, found), found), encoding="utf-8")
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
