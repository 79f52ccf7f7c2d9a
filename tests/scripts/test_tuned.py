"""What tuned schedules are compared with: the grid of single patterns, and the choice of the best."""

import math

import pytest
import torch

from scripts.measure.guidance import others
from scripts.measure.tuned import in_turns, prompts_of
from scripts.measure.tuned_grid import best_single, grid_of, is_within, largest_first, measure_grid, single
from visattn import parse
from visattn.pipelines.embedded import EMBEDDED
from visattn.tuning.candidates import candidates
from visattn.tuning.goal import Goal
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer
from visattn.tuning.plan import Plan
from visattn.tuning.subject import DENSE, Local, Outcome

FAILS = "topp(p=0.95, every=4, drift=inf)"


class Listed:
    """Attention that takes as long as its pattern is dense, and an output that is off by what is left out."""

    measure = "psnr"
    device = torch.device("cuda")
    model, layers, parameters, steps, grid = "Listed", 2, 17, 8, (16, 16)

    def local(self, step, names, seeds, timed):
        return [{name: Local(0.1, 1.0 if name == DENSE else 0.5) for name in names}] * 2

    def outcome(self, edges, assignment, seeds, timed=True):
        names = [name for row in assignment for name in row]
        if FAILS in names:
            raise RuntimeError("no kernel\nfor that")
        kept = [getattr(parse(name), "keep", 1.0 if name == DENSE else 0.3) for name in names]
        error = sum(1 - k for k in kept) / len(kept) / 100
        psnr = -10 * math.log10(error) if error else math.inf
        return Outcome((psnr,) * len(seeds), (), (), sum(kept), sum(kept))


@pytest.mark.parametrize("name", ["emoji", "animoji"])
def test_there_are_at_least_60_in_the_grid(name):
    grid = EMBEDDED[name].grid
    found = grid_of(candidates(grid, 6), grid)
    assert DENSE not in found and len(found) == len(set(found)) and 2 * len(found) >= 60


def test_the_fastest_that_holds_is_the_best_and_what_is_left_out_says_why():
    measurer = Measurer(Listed(), Plan((DENSE, "topk"), seeds=2, quick=1), Journal(None, {}))
    rows = measure_grid(measurer, grid_of(candidates((16, 16), 4), (16, 16)), [Goal(psnr=25.0), Goal(psnr=30.0)])
    assert len(rows) >= 60 and all({"error", "quick", "psnr"} & set(row) for row in rows)
    assert [row["error"] for row in rows if row["pattern"] == FAILS] == ["no kernel"] * 3
    # What is far from the bound with the first steps dense is not measured without.
    far = {row["pattern"] for row in rows if "quick" in row and row["dense_stages"]}
    assert far and all("far from" in row["error"] for row in rows if row["pattern"] in far and not row["dense_stages"])
    goal = Goal(psnr=25.0, margin=0.5, held_out=3)
    best = best_single(rows, goal, measurer)
    good = [row for row in rows if "psnr" in row and row["psnr"][0] >= 25.5]
    assert 0 < len(good) < len(rows) and best["attention_seconds"] == min(row["attention_seconds"] for row in good)
    assert len(best["psnr"]) == 3
    assert best_single(rows, Goal(psnr=90.0), measurer)["pattern"] == DENSE
    assert single(measurer, "topk", 1) == ((DENSE, "topk", "topk", "topk"),) * 2


@pytest.mark.parametrize(
    ("one", "other", "within"),
    [
        ("topk(keep=0.2)", "topk(keep=0.5)", True),
        ("topk(keep=0.5)", "topk(keep=0.2)", False),
        ("topk(keep=0.2)", "topk(keep=0.5, rest=mean)", False),
        ("topk(keep=0.2)", "topp(p=0.9)", False),
        ("na(window=3x5)", "na(window=5x5)", True),
        ("na(window=3x7)", "na(window=5x5)", False),
        ("na(window=3x3)", "na(window=3x3)", True),
        ("residual(of=na(window=3x3))", "residual(of=na(window=5x5))", True),
        ("residual(of=na(window=3x3))", "residual(of=na(window=5x5), every=2)", False),
        ("residual(of=na(window=3x3))", "na(window=5x5)", False),
        ("broadcast(every=2)", "broadcast(every=3)", False),
    ],
)
def test_patterns_within_others_come_behind_them(one, other, within):
    assert is_within(one, other) == within
    if within and one != other:
        assert largest_first([one, other]) == [other, one]


def test_what_is_compared_takes_turns_and_is_not_measured_again():
    measurer = Measurer(Listed(), Plan((DENSE, "topk"), seeds=2), Journal(None, {}))
    assignments = {"dense": single(measurer, DENSE, 0), "single": single(measurer, "topk(keep=0.5)", 0)}
    found = in_turns(assignments, Goal(psnr=25.0, held_out=3), measurer)
    assert found["dense"]["attention_seconds"] == 8.0 and found["single"]["seconds"] == 4.0
    measurer.subject = None
    assert in_turns(assignments, Goal(psnr=25.0, held_out=3), measurer) == found


def test_prompts_are_as_many_as_asked_for_and_leave_others_to_verify_with():
    assert prompts_of("emoji", None) == prompts_of("emoji", 5) and prompts_of("animoji", 2) == (
        "clapping hands",
        "waving hand, 3d",
    )
    found = prompts_of("emoji", 20)
    assert len(set(found)) == 20 and found[:5] == prompts_of("emoji", 5) and len(others(found)) == 20
    with pytest.raises(ValueError, match="--prompts 6: animoji has 1 to 5"):
        prompts_of("animoji", 6)


def test_where_the_quick_samples_are_all_a_single_pattern_runs_once():
    class Counted(Listed):
        calls = 0

        def outcome(self, edges, assignment, seeds, timed=True):
            Counted.calls += 1
            return super().outcome(edges, assignment, seeds, timed)

    measurer = Measurer(Counted(), Plan((DENSE, "topk"), seeds=2, quick=2), Journal(None, {}))
    rows = measure_grid(measurer, ("topk(keep=0.2)", "topk(keep=0.7)"), [Goal(psnr=20.0)])
    assert Counted.calls == len([row for row in rows if {"psnr", "quick"} & set(row)]) > 0
