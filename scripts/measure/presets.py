"""Verifies tuned schedules where they were not tuned: at other sizes, with other numbers of steps, on other prompts.

    python -m scripts.measure.presets --size 256 --steps 12 24 --device cuda --out docs/results/presets-emoji-256.json

Every schedule draws the same samples: half of them the prompts that it was tuned with, half others, all from noise that
no search has seen; PSNR is to their dense twins. Beside them the best single patterns that were found where they were
tuned. All of them run twice, the second time in the reverse order, so that times compare. What the file has is not
measured again; `--seconds` begins nothing after so long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts import cli
from scripts.continued import earlier
from scripts.measure.guidance import others
from scripts.results import RESULTS
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.tuning.subject import PipelineSubject, Samples
from visattn.schedule import Schedule
from visattn.tuned import Tuned
from visattn.tuning.plan import stages_of
from visattn.tuning.subject import DENSE

SCHEDULES = tuple(RESULTS / f"schedule-emoji-384-{bound}.json" for bound in (25, 30, 35))
# Far behind the noise of any search and of what verified it (`visattn.tuning.plan.HELD_OUT`).
FIRST_SEED = 1_000_000_000
TURNS = 2


class Case(NamedTuple):
    """What draws samples.

    Attributes:
        name: Of its rows.
        bound: Least PSNR in dB that it was chosen for, 0 for dense attention.
        pattern: What it is, where that is one pattern.
        tuned: The schedule, None for dense attention.
    """

    name: str
    bound: float
    pattern: str
    tuned: Tuned | None

    @property
    def schedule(self) -> Schedule:
        """What `apply` takes."""
        return Schedule.of(DENSE) if self.tuned is None else Schedule.tuned(self.tuned)


def cases(schedules: dict[str, Tuned], singles: dict[str, Any]) -> list[Case]:
    """Dense attention, the schedules, and the best single patterns at their bounds that are none of these."""
    found = [Case(DENSE, 0.0, DENSE, None)]
    for name, tuned in schedules.items():
        found.append(Case(name, tuned.settings["goal"]["psnr"], "", tuned))
    for tuned in schedules.values():
        bound = tuned.settings["goal"]["psnr"]
        best = singles.get(f"{bound:g}", {}).get("single", {"pattern": DENSE})
        if best["pattern"] != DENSE:
            edges, first = tuned.settings["edges"], best["dense_stages"]
            row = (DENSE,) * first + (best["pattern"],) * (len(edges) - 1 - first)
            alone = replace(tuned, layers={layer: stages_of(edges, row) for layer in tuned.layers})
            text = f"{best['pattern']}, {first} part{'s' * (first != 1)} dense"
            found.append(Case(f"single-{bound:g}", bound, text, alone))
    return found


def prompts_of(tuned: Sequence[Tuned], count: int) -> list[str]:
    """Prompts of the samples: so many that the schedules were tuned with, again and again, and as many others.

    Raises:
        ValueError: If they were tuned with different ones.
    """
    (known, *more) = {tuple(each.settings["subject"]["samples"]["prompts"]) for each in tuned}
    if more:
        raise ValueError(f"schedules tuned with other prompts ({known[0]!r}, {more[0][0]!r}): measure them one by one")
    new = others(known)[::-1]
    if len(new) < count:
        raise ValueError(f"--count {count}: there are {len(new)} other prompts, pass at most as many")
    return [*(known[i % len(known)] for i in range(count)), *new[:count]]


def order(options: argparse.Namespace, names: Sequence[Case]) -> Iterator[tuple[int, int, int, Case]]:
    """What is measured: turn, size, steps, case. First the quality of all schedules everywhere."""
    for turn in range(TURNS):
        for size in options.size:
            for steps in options.steps:
                for case in names[:: -1 if turn % 2 else 1]:
                    yield turn, size, steps, case


def measured(subject: PipelineSubject, case: Case, count: int) -> dict[str, Any]:
    """One run of all samples."""
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + 2 * count))
    found = subject.outcome_of(case.schedule, seeds).to_dict()
    return {name: found[name] for name in ("psnr", "ssim", "seconds", "attention_seconds")}


def measure(options: argparse.Namespace) -> list[str]:
    """Measure what the file does not have yet; what failed, in words."""
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    schedules = {path.stem: Tuned.read(path) for path in options.schedules}
    model = {each.settings["subject"]["model"] for each in schedules.values()}
    if len(model) > 1:
        raise ValueError(f"the schedules are of {', '.join(sorted(model))}: pass those of one model")
    singles = json.loads(options.singles.read_text(encoding="utf-8"))["bounds"]
    prompts = prompts_of(list(schedules.values()), options.count)
    pipe: Any = load_pipeline(model.pop(), options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "model": next(iter(schedules.values())).settings["subject"]["model"],
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "batch": options.batch,
        "prompts": prompts,
        "schedules": {name: digest(each) for name, each in schedules.items()},
    }
    report: dict[str, Any] = {"settings": settings, "versions": versions(), "devices": devices(), "rows": []}
    report = earlier(options.out, report, options.device) or report
    done = {(row["turn"], row["size"], row["steps"], row["name"]) for row in report["rows"]}
    subjects: dict[tuple[int, int], PipelineSubject] = {}
    failed: list[str] = []
    for turn, size, steps, case in order(options, cases(schedules, singles)):
        if (turn, size, steps, case.name) in done:
            continue
        if options.seconds and time.monotonic() - start > options.seconds:
            print(f"stopped after {options.seconds:g} s: the same command goes on", flush=True)
            break
        if (size, steps) not in subjects:
            samples = Samples(tuple(prompts), steps, None, (size, size), None, options.batch)
            subjects[size, steps] = PipelineSubject(pipe, samples)
        subject = subjects[size, steps]
        row = {"turn": turn, "size": size, "grid": list(subject.grid), "steps": steps, "name": case.name}
        try:
            row |= {"bound": case.bound, "pattern": case.pattern} | measured(subject, case, options.count)
        except (ValueError, RuntimeError) as error:
            # What cannot run keeps nothing else from being measured.
            failed.append(f"{size} px, {steps} steps, {case.name}: {str(error).splitlines()[0]}")
            print(failed[-1], flush=True)
            continue
        report["rows"].append(row)
        print(f"{time.monotonic() - start:6.1f} s  {told(row)}", flush=True)
        write_json(options.out, report)
    return failed


def digest(tuned: Tuned) -> str:
    """Tells schedules with other patterns apart."""
    return hashlib.sha256(json.dumps([tuned.grid, tuned.layers], sort_keys=True).encode()).hexdigest()[:16]


def held(row: dict[str, Any]) -> tuple[int, int]:
    """How many samples of a row have its bound: of the prompts it was tuned with, and of others."""
    good = [value is None or value >= row["bound"] for value in row["psnr"]]
    half = len(good) // 2
    return sum(good[:half]), sum(good[half:])


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    finite = [value for value in row["psnr"] if value is not None]
    seen = "equal to dense"
    if finite:
        known, others = held(row)
        seen = f"PSNR {sum(finite) / len(finite):.2f} in the mean, {min(finite):.2f} at worst, "
        seen += f"held in {known} + {others} of {len(row['psnr'])}"
    return (
        f"{row['size']} px, {row['steps']} steps, {row['name']}: attention {1e3 * row['attention_seconds']:.2f} ms, "
        f"sample {1e3 * row['seconds']:.2f} ms, {seen}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("schedules", nargs="*", type=Path, default=list(SCHEDULES), help="files of visattn tune, of one model")
    add("--singles", type=Path, default=RESULTS / "tuned-emoji-384.json", help="where single patterns were measured")
    add("--size", nargs="+", type=cli.count, default=[256], help="sides in pixels")
    add("--steps", nargs="+", type=cli.count, default=[12], help="numbers of denoising steps")
    add("--count", type=cli.count, default=20, help="samples of the prompts it was tuned with, and as many of others")
    add("--batch", type=cli.count, default=20, help="samples at once")
    add("--device", type=cli.device, default="cpu")
    add("--dtype", help="float32 (the CPU's), bfloat16 (elsewhere), float16")
    add("--threads", type=cli.count, default=8)
    add("--seconds", type=cli.number, default=0.0, help="begin nothing after so long; 0: no limit")
    add("--out", type=cli.file_to_write, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    with cli.told("presets"), cli.only_writer(options.out):
        failed = measure(options)
    if failed:
        raise SystemExit(f"presets: {len(failed)} did not run: {failed[0]}")


if __name__ == "__main__":
    main()
