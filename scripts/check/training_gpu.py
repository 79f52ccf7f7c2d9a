"""Distillation on two GPUs under `accelerate launch` against one: DDP, FSDP2, and two processes for each clip's tokens.

    python -m scripts.check.training_gpu --out out/training [--budget 150]

Runs a few steps of a small distillation in each way, and compares the students' weights. Ends with status 1 if one way
differs or fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

COMMON = ("--steps", "6", "--batch", "8", "--warmup", "1", "--lr", "1e-4", "--attention", "0", "--no-resume")
# Name, model, pattern, and what makes it run on two processes.
WAYS = (
    ("ddp", "digits", "clear(radius=3)", ("--micro-batch", "2")),
    ("fsdp2", "digits", "clear(radius=3)", ("--micro-batch", "2", "--fsdp")),
    ("fsdp2 lora", "digits", "clear(radius=3)", ("--fsdp", "--lora", "4")),
    ("sequence halo", "moving-digits", "na(window=3x3x3)", ("--sequence", "2")),
    ("sequence ulysses", "moving-digits", "na(window=3x3x3)", ("--sequence", "2", "--parallel", "ulysses", "--fsdp")),
)
# Of the norm of what was learned: Adam makes rounding of small gradients as large as any step.
LARGEST = 0.1


def run(words: list[str]) -> str:
    """Run a module; the end of what it said if it failed."""
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout[-1500:] if done.returncode else ""


def learned(out: Path, model: str, pattern: str, more: list[str], launcher: list[str]) -> dict[str, torch.Tensor]:
    """The trained tensors of a run.

    Raises:
        ValueError: If it fails.
    """
    words = ["scripts.distill.pipeline", "--model", model, "--pattern", pattern, "--out", str(out), *COMMON, *more]
    words += ["--samples", str(out.parent / f"samples-{model}")]
    failed = run([*launcher, *words])
    if failed:
        raise ValueError(failed)
    return load_file(out / "student.safetensors")


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], first: dict[str, torch.Tensor]) -> float:
    """Distance of two results as a share of what one has learned since the first."""
    names = [name for name in one if not name.endswith("to_k.bias")]
    apart, moved = (
        torch.stack([(a[name].float() - b[name].float()).norm() for name in names]).norm()
        for a, b in ((one, two), (one, first))
    )
    return float(apart / moved)


def main() -> int:
    """Run all ways until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no way begins")
    options = parser.parse_args()
    began, wrong = time.monotonic(), 0
    known: dict[tuple[str, ...], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    for name, model, pattern, more in WAYS:
        if time.monotonic() - began > options.budget:
            print(f"no time for {name}", flush=True)
            continue
        lora = ["--lora", "4"] * ("lora" in name)
        try:
            if (model, *lora) not in known:
                cache = ["--model", model, "--labels", "0-9", "--count", "16", "--steps", "4"]
                samples = options.out / f"samples-{model}"
                failed = (
                    "" if samples.is_dir() else run(["scripts.distill.cache_samples", *cache, "--out", str(samples)])
                )
                if failed:
                    raise ValueError(failed)
                start, end = (
                    learned(
                        options.out / f"one-{model}-{steps}{len(lora)}", model, pattern, [*lora, "--steps", steps], []
                    )
                    for steps in ("1", "6")
                )
                known[model, *lora] = start, end
            start, end = known[model, *lora]
            found = learned(options.out / name.replace(" ", "-"), model, pattern, list(more), launcher)
            error = distance(end, found, start)
        except ValueError as failed:
            wrong += 1
            print(f"WRONG {name}: {failed}", flush=True)
            continue
        wrong += error > LARGEST
        seconds = time.monotonic() - began
        print(
            f"{'WRONG' if error > LARGEST else 'right'} {name}: {error:.1e} of what was learned ({seconds:.0f} s)",
            flush=True,
        )
    print("all right" if not wrong else f"{wrong} wrong", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
