"""What tuned schedules are compared with: the grid of single patterns, and the choice of the best."""

import math

import pytest

from scripts.measure.tuned import best_single, everywhere, grid_of, measure_grid
from visattn import parse
from visattn.pipelines.embedded import EMBEDDED
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer, Plan
from visattn.tuning.search import Goal
from visattn.tuning.subject import DENSE, Outcome


class Listed:
    """Attention that takes as long as its pattern is dense, and an output that is off by what is left out."""

    model, layers, parameters, steps, grid = "Listed", 2, 17, 8, (16, 16)

    def outcome(self, edges, assignment, seeds, timed=True):
        names = [name for row in assignment for name in row]
        if "topp(p=0.5)" in names:
            raise RuntimeError("no kernel\nfor that")
        kept = [getattr(parse(name), "keep", 1.0 if name == DENSE else 0.3) for name in names]
        error = sum(1 - k for k in kept) / len(kept) / 100
        return Outcome((-10 * math.log10(error),) * len(seeds), (), (), sum(kept), sum(kept))


@pytest.mark.parametrize("name", ["emoji", "animoji"])
def test_there_are_at_least_60_in_the_grid(name):
    found = grid_of(EMBEDDED[name].grid, 6)
    assert DENSE not in found and len(found) == len(set(found)) and 2 * len(found) >= 60


def test_the_fastest_that_holds_is_the_best_and_what_fails_says_why():
    measurer = Measurer(Listed(), Plan((DENSE, "topk"), seeds=2), Journal(None, {}))
    rows = measure_grid(measurer, 4, 25.0)
    assert [row["error"] for row in rows if "error" in row] == ["no kernel"] * 2
    # What is far from the bound is not measured further.
    assert all(row["quick"][0] < 22 for row in rows if "quick" in row) and any("quick" in row for row in rows)
    goal = Goal(psnr=25.0, margin=0.5, held_out=3)
    best = best_single(rows, goal, measurer)
    good = [row for row in rows if "psnr" in row and row["psnr"][0] >= 25.5]
    assert 0 < len(good) < len(rows) and best["attention_seconds"] == min(row["attention_seconds"] for row in good)
    assert len(best["psnr"]) == 3
    assert best_single(rows, Goal(psnr=90.0), measurer) is None
    assert everywhere("topk", measurer, 1) == ((DENSE, "topk", "topk", "topk"),) * 2
