"""How long a step of distillation takes on a real GPU: launch by launch, and recorded as a CUDA graph.

    python -m scripts.distill.cache_samples --model emoji --prompts prompts.txt --count 16 --steps 4 --out runs/few
    python -m scripts.bench.distill_gpu --samples runs/few --methods topk sla2 --batches 4 8

For each method at 95 % and each batch: milliseconds of a step both ways, what the host spends in each part of it, what
the GPU works in one of them (its kernels added up), how many kernels that are, and the loss behind the last step: both
ways learn the same, up to the rounding of other kernels. With --model animoji the same of clips. Cases that --out has
from the same versions are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scripts.distill.config import Config
from scripts.distill.loop import prepared
from scripts.distill.methods import METHODS, settings_of
from scripts.distill.training import Training
from scripts.gpu_common import go_on, measure_cases, versions

STEPS, PROFILED = 40, 3
SPARSITY = 0.95


def host_parts(run: Training) -> dict[str, float]:
    """Seconds that the host spends in the parts of a run's steps from now on; it does not wait for the GPU there."""
    spent: dict[str, float] = {}

    def timed(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def instead(*given: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, name, instead)

    for owner, name in ((run, "draw"), (run, "_clip"), (run.optimizer, "step"), (run, "_average")):
        timed(owner, name)
    timed(*((run, "_gradients") if run.recorded is None else (run.recorded, "run")))
    return spent


def measure(options: argparse.Namespace, method: str, batch: int, graphs: bool) -> dict[str, Any]:
    """Figures of a short run at its final pattern."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(method, SPARSITY) | {"pattern": METHODS[method].final(SPARSITY), "stages": "all"}
        given = {"model": options.model, "samples": options.samples, "out": Path(folder) / "run", "batch": batch}
        config = Config(**settings, **given, precision="bf16", graphs=graphs, warmup=5, lr=1e-3, steps=10_000)
        with prepared(config):
            run = Training(config)
        start = time.perf_counter()
        for _ in range(5):
            run.train_step()
        torch.cuda.synchronize()
        host = host_parts(run)
        begun = time.perf_counter()
        for _ in range(STEPS):
            figures = run.train_step()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        found: dict[str, Any] = {
            "first_s": begun - start,
            "step_ms": 1000 * (ended - begun) / STEPS,
            "host_ms": {name: round(1000 * seconds / STEPS, 2) for name, seconds in host.items()},
            "output": float(figures["output"]),
        }
        recorded = run.recorded is not None and run.recorded.replays
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                run.train_step()
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
        found |= {"kernels_ms": sum(event.time_range.elapsed_us() for event in kernels) / 1000 / PROFILED}
        peak = torch.cuda.max_memory_allocated() / 1e9
        found |= {"kernels": len(kernels) // PROFILED, "recorded": recorded, "peak_gb": peak}
        if options.top:
            table = profile.key_averages()
            found["top"] = {each.key[:70]: round(each.self_device_time_total / 1000 / PROFILED, 2) for each in
                            sorted(table, key=lambda each: -each.self_device_time_total)[: options.top]}  # fmt: skip
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="teacher")
    parser.add_argument("--samples", type=Path, required=True, help="folder that scripts.distill.cache_samples wrote")
    parser.add_argument("--methods", nargs="+", default=["topk"], choices=list(METHODS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--top", type=int, default=0, help="also the so many longest kernels of a step, in ms")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no case after so long; 0: no limit")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    end = time.perf_counter() + (options.seconds or math.inf)
    report: dict[str, Any] = {"versions": versions(), "model": options.model, "cases": {}}
    go_on(report, options.out)
    cases = {
        f"{method}, {batch} samples, {'recorded' if graphs else 'launched'}": (method, batch, graphs)
        for method, batch, graphs in itertools.product(options.methods, options.batches, (False, True))
    }

    def told(name: str) -> dict[str, Any]:
        method, batch, graphs = cases[name]
        torch.cuda.reset_peak_memory_stats()
        case = {"method": method, "batch": batch, "graphs": graphs} | measure(options, method, batch, graphs)
        print(json.dumps(case), flush=True)
        return case

    measure_cases([name for name in cases if name not in report["cases"]], told, report, options.out, end)


if __name__ == "__main__":
    main()
