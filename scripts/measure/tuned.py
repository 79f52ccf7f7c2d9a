"""Measures tuned schedules of an embedded model against the best single pattern from a grid of at least 60.

    python -m scripts.measure.tuned --model emoji --device cuda --seconds 280 --out out/tuned

For each bound (PSNR to dense, in 95 % of the samples) `visattn.tuning` searches a schedule. The grid has each pattern
for all layers, once for all steps and once with the first part of the steps dense. Both are chosen on the same samples
with the same margin, and verified on the same 20 held-out ones. What is measured is in a journal in --out, so that the
same command goes on where it was stopped; MODEL-results.json has what is done so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from visattn.environment import devices, versions
from visattn.files import written_whole
from visattn.patterns import parse
from visattn.pipelines.embedded import EMBEDDED
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.tuning.subject import PipelineSubject, Samples
from visattn.staged import with_precision
from visattn.tuning.candidates import candidates, checked, kind_of, precisions_of
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer, OutOfTime, Plan
from visattn.tuning.search import HELD_OUT, Goal, Search, tuned
from visattn.tuning.subject import DENSE, Assignment, Outcome

PROMPTS = {
    "emoji": ("bus, gradient", "smiling cat, flat", "a red apple, 3d", "post office, gradient", "rocket, 3d"),
    "animoji": ("clapping hands", "waving hand, 3d", "man juggling", "red apple, still", "party popper"),
}
# Further windows of the grid beyond the candidates of the search, as shares of the axes.
WINDOWS = (0.2, 0.3, 0.6, 0.9)
# What patterns list more of the larger it is.
SHARES = ("keep", "p", "window")
# Of --seconds, for the searches and for the grid after them.
SEARCHES, GRID = 0.65, 0.9
# Times that what is compared runs.
TURNS = 2


def grid_of(names: Sequence[str], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Single patterns for a grid of tokens: the candidates of the search, those without means, and more windows."""
    more = [f"na(window={'x'.join(str(max(1, round(w * n)) | 1) for n in shape)})" for w in WINDOWS]
    bare: list[Any] = [parse(name) for name in names if "rest=mean" in name]
    return checked([*names, *(str(dataclasses.replace(each, rest="drop")) for each in bare), *more], shape)[1:]


def fields_of(name: str) -> dict[str, Any]:
    """Parameters of a pattern."""
    pattern: Any = with_precision(name)[0]
    return dataclasses.asdict(pattern)


def is_within(one: str, other: str) -> bool:
    """Whether a pattern lists no more than another one of its kind for every query."""
    a, b = (fields_of(name) | {"kind": kind_of(name)} for name in (one, other))
    share = next((name for name in SHARES if name in a), "")
    if not share or share not in b or {**a, share: None} != {**b, share: None}:
        return one == other
    x, y = a[share], b[share]
    return all(i <= j for i, j in zip(x, y, strict=True)) if isinstance(x, tuple) else x <= y


def largest_first(names: Sequence[str]) -> list[str]:
    """Patterns in an order in which those within others come behind them."""
    sizes = {}
    for name in names:
        values = fields_of(name)
        size = next((values[share] for share in SHARES if share in values), 0.0)
        sizes[name] = math.prod(size) if isinstance(size, tuple) else size
    return sorted(names, key=lambda name: -sizes[name])


def is_coarse(name: str) -> bool:
    """Whether a pattern chooses blocks and has nothing for the rest."""
    pattern, precision = with_precision(name)
    return precision is None and getattr(pattern, "rest", "") == "drop"


def everywhere(pattern: str, measurer: Measurer, first: int) -> Assignment:
    """A pattern at all layers and stages but the first ones."""
    stages = measurer.plan.stages
    row = (DENSE,) * first + (pattern,) * (stages - first)
    return (row,) * measurer.subject.layers


def families(names: Sequence[str]) -> list[list[str]]:
    """Patterns that differ in how much they list alone, from the least to the most."""
    found: list[list[str]] = []
    for name in reversed(largest_first(names)):
        home = next((some for some in found if is_within(some[-1], name)), None)
        if home is None:
            found.append([name])
        else:
            home.append(name)
    return found


def measure_grid(measurer: Measurer, patterns: Sequence[str], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """Quality and time of every single pattern, as far as the time reaches; of those left out it says why.

    Of patterns that differ in how much they list alone, those are left out that list less than one far from all bounds,
    or more than one that holds all of them.

    Args:
        measurer: Measures.
        patterns: The single patterns.
        goals: One for each bound.
    """
    lowest, highest = (pick(goals, key=lambda goal: goal.psnr or 0.0) for pick in (min, max))
    slow, far = slower_than_dense(measurer), []
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def visit(pattern: str, first: int) -> dict[str, Any]:
        row = rows[pattern, first] = {"pattern": pattern, "dense_stages": first}
        measure_single(row, measurer, lowest)
        if "quick" in row:
            far.append(pattern)
        print(f"grid {len(rows)} of {2 * len(patterns)}: {pattern}, {first}", flush=True)
        return row

    try:
        # What is far off even with the first steps dense is farther without.
        for first, family in itertools.product((1, 0), families(patterns)):
            left = []
            for pattern in family:
                farther = next((name for name in far if is_within(pattern, name)), None)
                if pattern in slow:
                    why = "takes longer than dense attention"
                elif farther is not None:
                    why = f"far from all bounds, as {farther} with as many dense steps or more"
                else:
                    left.append(pattern)
                    continue
                rows[pattern, first] = {"pattern": pattern, "dense_stages": first, "error": why}
            # Halves find where bounds begin to hold, then one by one until all of them do.
            low, high = 0, len(left)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if "quick" in visit(left[middle], first) else (low, middle)
            for at, pattern in enumerate(left):
                if (pattern, first) in rows and "psnr" not in rows[pattern, first]:
                    continue
                if at < low:
                    why = f"far from all bounds, as {left[low - 1]}"
                    rows[pattern, first] = {"pattern": pattern, "dense_stages": first, "error": why}
                    continue
                row = rows.get((pattern, first)) or visit(pattern, first)
                if "psnr" in row and holds(row, highest):
                    for more in left[at + 1 :]:
                        why = f"lists more than {pattern}, which holds all bounds"
                        rows.setdefault((more, first), {"pattern": more, "dense_stages": first, "error": why})
                    break
    except OutOfTime:
        print("the grid is cut by --seconds", flush=True)
    return list(rows.values())


def holds(row: dict[str, Any], goal: Goal) -> bool:
    """Whether the measured samples of a row have a bound and its margin."""
    assert goal.psnr is not None
    return Outcome.of(row).held(goal.share) >= goal.psnr + goal.margin


def measure_single(row: dict[str, Any], measurer: Measurer, goal: Goal) -> None:
    """Measure a row of the grid: unless its quick samples alone say that it misses the bound, all of them."""
    assert goal.psnr is not None
    assignment, samples = everywhere(row["pattern"], measurer, row["dense_stages"]), measurer.plan.samples
    try:
        quick = measurer.quality(assignment)
        # The quick samples are some of all: more of them below the bound than may be of all is enough.
        below = sum(value < goal.psnr + goal.margin for value in quick.psnr)
        if below > int((1 - goal.share) * len(samples) + 1e-9):
            row["quick"] = list(quick.psnr)
        else:
            row |= measurer.outcome(assignment, samples).to_dict()
    except (ValueError, RuntimeError) as error:
        row["error"] = str(error).splitlines()[0]


def slower_than_dense(measurer: Measurer) -> set[str]:
    """Candidates whose calls take longer than dense ones in every layer; none where no times were measured."""
    try:
        rows = measurer.middle()
    except OutOfTime:
        return set()
    faster = {name for row in rows for name, each in row.items() if each.seconds < row[DENSE].seconds}
    return set(measurer.plan.candidates) - faster - {DENSE}


def best_single(rows: Sequence[dict[str, Any]], goal: Goal, measurer: Measurer) -> dict[str, Any]:
    """The fastest that holds on the measured samples, verified on held-out ones: of the grid, or dense attention."""
    dense = everywhere(DENSE, measurer, 0)
    good = [row for row in rows if "psnr" in row and holds(row, goal)]
    good.append({"pattern": DENSE, "dense_stages": 0} | measurer.outcome(dense, measurer.plan.samples).to_dict())
    best = min(good, key=lambda row: row["attention_seconds"])
    first = measurer.plan.seed + HELD_OUT
    assignment = everywhere(best["pattern"], measurer, best["dense_stages"])
    found = measurer.outcome(assignment, range(first, first + goal.held_out))
    return {"pattern": best["pattern"], "dense_stages": best["dense_stages"], **found.to_dict()}


def in_turns(assignments: dict[str, Assignment], goal: Goal, measurer: Measurer) -> dict[str, Any]:
    """Seconds of a sample in attention and in all, medians of turns: what is compared runs close together."""
    first = measurer.plan.seed + HELD_OUT
    seeds = range(first, first + min(goal.held_out, measurer.plan.seeds))
    subject, edges = measurer.subject, measurer.plan.edges
    found: dict[str, list[Outcome]] = {name: [] for name in assignments}
    for turn in range(TURNS):
        for name, assignment in list(assignments.items())[:: -1 if turn % 2 else 1]:
            key = ["turn", turn, assignment, list(seeds)]
            row = measurer.journal.get(key, lambda: subject.outcome(edges, assignment, seeds).to_dict())  # noqa: B023
            found[name].append(Outcome.of(row))
    return {
        name: {
            "attention_seconds": statistics.median(each.attention_seconds for each in some),
            "seconds": statistics.median(each.seconds for each in some),
        }
        for name, some in found.items()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Searches for every bound, then measures the grid, and writes results after each."""
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    pipe: Any = load_pipeline(options.model, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    size = None if options.size is None else (options.size, options.size)
    samples = Samples(PROMPTS[options.model], options.steps, options.guidance, size, None, options.batch)
    subject = PipelineSubject(pipe, samples, options.model)
    # Lists that are kept for all steps of a stage.
    every = max(1, round(subject.steps / options.stages))
    kinds = precisions_of(subject.device) if options.eight_bits else ()
    given = options.candidates and checked(options.candidates, subject.grid)
    names = given or [name for name in candidates(subject.grid, every, kinds) if not (options.lean and is_coarse(name))]
    plan = Plan(
        tuple(names),
        options.stages,
        options.groups,
        probes=options.probes,
        checks=options.checks,
        seeds=options.seeds,
        quick=options.quick,
    )
    journal = Journal(
        options.out / f"{options.model}.jsonl", subject.about() | {"candidates": plan.candidates, "stages": plan.stages}
    )

    def tell(what: str, done: int, of: int) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {what}: {done} of {of}", flush=True)

    measurer = Measurer(subject, plan, journal, start + SEARCHES * options.seconds, tell)
    results: dict[str, Any] = {"about": subject.about(), "versions": versions(), "devices": devices(), "bounds": {}}
    goals = {f"{bound:g}": Goal(psnr=bound, held_out=options.held_out) for bound in options.psnr}
    for bound, goal in goals.items():
        # Dense twins, verifying and what is compared are measured whatever the clock says.
        measurer.deadline = start + SEARCHES * options.seconds
        results["bounds"][bound] = search(goal, measurer, options)
        write(results, options)
    measurer.deadline = start + GRID * options.seconds
    results["grid"] = measure_grid(measurer, grid_of(names, subject.grid), list(goals.values()))
    write(results, options)
    measurer.deadline = math.inf
    for bound, goal in goals.items():
        if "tuned" in results["bounds"][bound]:
            results["bounds"][bound] |= compare(goal, measurer, results, results["bounds"][bound]["assignment"])
            write(results, options)
    return results


def search(goal: Goal, measurer: Measurer, options: argparse.Namespace) -> dict[str, Any]:
    """A tuned schedule, verified."""
    searched = Search(measurer, goal)
    try:
        found = searched.run()
    except ValueError as error:
        return {"error": str(error)}
    made = tuned(searched, found)
    made.write(options.out / f"{options.model}-{goal.psnr:g}.json")
    return {
        "assignment": found.assignment,
        "tuned": found.verified.to_dict(),
        "verified": dict(made.verified),
        "held_in": sum(value >= (goal.psnr or 0) for value in found.verified.psnr),
        "complete": found.complete,
        "missed": found.missed,
        "rank_correlation": found.ranks,
        "tried": found.tried,
    }


def compare(goal: Goal, measurer: Measurer, results: dict[str, Any], assignment: Assignment) -> dict[str, Any]:
    """The best single pattern for a bound, and the times of a tuned schedule, that pattern and dense attention."""
    single = best_single(results["grid"], goal, measurer)
    compared = {
        "tuned": assignment,
        "single": everywhere(single["pattern"], measurer, single["dense_stages"]),
        "dense": everywhere(DENSE, measurer, 0),
    }
    return {"single": single, "times": in_turns(compared, goal, measurer)}


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes the results whole."""
    with written_whole(options.out / f"{options.model}-results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def report(results: dict[str, Any]) -> None:
    """Prints a line for each bound."""
    for bound, row in results["bounds"].items():
        if "times" not in row:
            print(f"{bound} dB: {row.get('error', 'not compared')}")
            continue
        times = {name: 1e3 * each["attention_seconds"] for name, each in row["times"].items()}
        gain, single = 1 - times["tuned"] / min(times["single"], times["dense"]), row["single"]
        print(
            f"{bound} dB: attention {times['tuned']:.2f} ms a sample, dense {times['dense']:.2f}, best single pattern "
            f"{times['single']:.2f} ({single['pattern']}, {single['dense_stages']} parts dense): "
            f"{gain:.0%} less; held in {row['held_in']} of {row['verified']['samples']}; "
            f"ranks {row['rank_correlation']}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[name for name in EMBEDDED if name in PROMPTS], default="emoji")
    add("--psnr", nargs="+", type=float, default=[25.0, 30.0, 35.0], help="bounds in dB")
    add("--seeds", type=int, default=20, help="samples of a schedule's quality")
    add("--quick", type=int, default=8, help="samples of an injection")
    add("--stages", type=int, default=4, help="equal parts of the steps with patterns of their own")
    add("--groups", type=int, default=12, help="groups of neighbouring layers that are injected together")
    add("--lean", action="store_true", help="search without patterns that drop what they do not list")
    add("--eight-bits", action=argparse.BooleanOptionalAction, default=True, help="candidates in int8 and fp8 too")
    add("--candidates", nargs="+", help="patterns for the search instead of its own, dense always among them")
    add("--probes", type=int, default=2, help="candidates that are injected at each layer and part")
    add("--checks", type=int, default=12, help="further injections, to see how well those predict")
    add("--held-out", type=int, default=20, help="samples that verify")
    add("--batch", type=int, default=20, help="samples at once")
    add("--steps", type=int, help="the model's own")
    add("--guidance", type=float, help="the model's own")
    add("--size", type=int, help="side in pixels, the model's own")
    add("--device", default="cpu")
    add("--dtype", help="float32 (the CPU's), bfloat16 (elsewhere), float16")
    add("--threads", type=int, default=8)
    add("--seconds", type=float, default=280.0, help="nothing new is begun after so long")
    add("--out", type=Path, default=Path("out/tuned"), help="folder of results, journal and schedules")
    try:
        report(measure(parser.parse_args(arguments)))
    except ValueError as error:
        raise SystemExit(f"tuned: {error}") from error


if __name__ == "__main__":
    main()
