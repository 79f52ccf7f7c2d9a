"""Measures tuned schedules of an embedded model against the best single pattern from a grid of at least 60.

    python -m scripts.measure.tuned --model emoji --device cuda --seconds 280 --out out/tuned

For each bound (PSNR to dense, in 95 % of the samples) `visattn.tuning` searches a schedule. The grid has each pattern
for all layers, for all steps and with the first one or two parts of the steps dense. Both are chosen on the same
samples with the same margin, and verified on the same 20 held-out ones. What is measured is in a journal in --out, so
that the same command goes on where it was stopped; MODEL-results.json has what is done so far. A second run of the same
model in the same folder is refused while the first one writes there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scripts import cli
from scripts.measure.guidance import others
from scripts.measure.tuned_grid import best_single, grid_of, measure_grid, single
from visattn.environment import devices, precisions_of, versions
from visattn.files import write_json
from visattn.pipelines.embedded import EMBEDDED
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.tuning.subject import PipelineSubject, Samples
from visattn.staged import with_precision
from visattn.tuning.candidates import candidates, checked
from visattn.tuning.found import tuned
from visattn.tuning.goal import Goal
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.plan import Plan
from visattn.tuning.search import Search
from visattn.tuning.subject import DENSE, Assignment, Outcome

PROMPTS = {
    "emoji": ("bus, gradient", "smiling cat, flat", "a red apple, 3d", "post office, gradient", "rocket, 3d"),
    "animoji": ("clapping hands", "waving hand, 3d", "man juggling", "red apple, still", "party popper"),
}
# Of --seconds, for the searches and for the grid after them.
SEARCHES, GRID = 0.65, 0.9
# Times that what is compared runs.
TURNS = 2


def prompts_of(model: str, count: int | None) -> tuple[str, ...]:
    """So many prompts: first the model's own, then of the emoji model's others. None for its own.

    Raises:
        ValueError: If there are not as many.
    """
    own = PROMPTS[model]
    more = others(own) if model == "emoji" else ()
    if count is not None and not 0 < count <= len(own) + len(more):
        raise ValueError(f"--prompts {count}: {model} has 1 to {len(own) + len(more)}")
    return own if count is None else (*own, *more)[:count]


def is_coarse(name: str) -> bool:
    """Whether a pattern chooses blocks and has nothing for the rest."""
    pattern, precision = with_precision(name)
    return precision is None and getattr(pattern, "rest", "") == "drop"


def in_turns(assignments: dict[str, Assignment], goal: Goal, measurer: Measurer) -> dict[str, Any]:
    """Seconds of a sample in attention and in all, medians of turns: what is compared runs close together."""
    seeds = measurer.plan.held_out(0, min(goal.held_out, measurer.plan.seeds))
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


def journal_of(options: argparse.Namespace) -> Path:
    """The file of what is measured; models may be measured side by side in one folder."""
    return options.out / f"{options.model}.jsonl"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Searches for every bound, then measures the grid, and writes results after each."""
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    pipe: Any = load_pipeline(options.model, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    size = None if options.size is None else (options.size, options.size)
    samples = Samples(
        prompts_of(options.model, options.prompts), options.steps, options.guidance, size, None, options.batch
    )
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
        steps=subject.steps,
    )
    journal = Journal(journal_of(options), subject.about() | {"candidates": plan.candidates, "edges": plan.edges})

    def tell(what: str, done: int, of: int) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {what}: {done} of {of}", flush=True)

    measurer = Measurer(subject, plan, journal, start + SEARCHES * options.seconds, tell)
    results: dict[str, Any] = {"about": subject.about(), "versions": versions(), "devices": devices(), "bounds": {}}
    goals = {f"{bound:g}": Goal(psnr=bound, held_out=options.held_out) for bound in options.psnr}
    end = measurer.deadline
    with contextlib.suppress(OutOfTime):
        # What serves all bounds comes first; of the time behind it each gets its share.
        Search(measurer, next(iter(goals.values()))).predict()
    for done, (bound, goal) in enumerate(goals.items()):
        # Dense twins, verifying and what is compared are measured whatever the clock says.
        now = time.monotonic()
        measurer.deadline = min(end, now + (end - now) / (len(goals) - done))
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
    try:
        found = Search(measurer, goal).run()
    except ValueError as error:
        return {"error": str(error)}
    made = tuned(measurer, goal, found)
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
    best = best_single(results["grid"], goal, measurer)
    compared = {
        "tuned": assignment,
        "single": single(measurer, best["pattern"], best["dense_stages"]),
        "dense": single(measurer, DENSE, 0),
    }
    return {"single": best, "times": in_turns(compared, goal, measurer)}


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes the results whole."""
    write_json(options.out / f"{options.model}-results.json", results)


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
    add("--psnr", nargs="+", type=cli.number, default=[25.0, 30.0, 35.0], help="bounds in dB")
    add("--prompts", type=cli.count, help="how many: of few a bound holds for these alone; the model's own five")
    add("--seeds", type=cli.count, default=20, help="samples of a schedule's quality")
    add("--quick", type=cli.count, default=4, help="samples of an injection")
    add(
        "--stages",
        type=int,
        default=4,
        help="parts of the steps with own patterns, each as long as those before it",
    )
    add("--groups", type=cli.count, default=12, help="groups of neighbouring layers that are injected together")
    add("--lean", action="store_true", help="search without patterns that drop what they do not list")
    add("--eight-bits", action=argparse.BooleanOptionalAction, default=True, help="candidates in int8 and fp8 too")
    add("--candidates", nargs="+", help="patterns for the search instead of its own, dense always among them")
    add("--probes", type=int, default=2, help="candidates that are injected at each layer and part")
    add("--checks", type=int, default=12, help="further injections, to see how well those predict")
    add("--held-out", type=cli.count, default=20, help="samples that verify")
    add("--batch", type=cli.count, default=20, help="samples at once")
    add("--steps", type=cli.count, help="the model's own")
    add("--guidance", type=cli.number, help="the model's own")
    add("--size", type=cli.count, help="side in pixels, the model's own")
    add("--device", type=cli.device, default="cpu")
    add("--dtype", help="float32 (the CPU's), bfloat16 (elsewhere), float16")
    add("--threads", type=cli.count, default=8)
    add("--seconds", type=cli.number, default=280.0, help="nothing new is begun after so long")
    add("--out", type=Path, default=Path("out/tuned"), help="folder of results, journal and schedules")
    options = parser.parse_args(arguments)
    with cli.told("tuned"), cli.only_writer(journal_of(options)):
        report(measure(options))


if __name__ == "__main__":
    main()
