"""Denoising steps of the published diffusers models with random weights: stock against patched, eager and compiled.

    python3 -m scripts.bench.real_models_gpu [--models "SDXL 1024" ...] [--modes eager] [--budget 480] [--out FILE]

bf16, no gradient; 80 GB hold the largest. Contenders are copies of one model that share its weights, each patched once.
They step in turns, in an order of its own in every round: what else the machine does comes and goes within seconds, and
hits all of them. A time is the median of the rounds, a speedup the median of the ratios of each round, with the
interval that holds it in 95 of 100 such runs. Eager contenders have two copies each, a round's time is their mean:
where the host is what a step waits for, it matters where in memory a model's objects lie, by a percent or two
("control" is the ratio of the two stock copies). What is compiled are the blocks (`compile_repeated_blocks`). First
calls (compilation, plans) come before and are not timed. Rows replace those of the same model, attention and mode in
FILE. After `--budget` seconds no model and mode is begun. `--tiny` runs small models on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import random
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scripts.bench.real_models import MODELS, build
from scripts.calls_gpu import kernels, profiled
from scripts.continued import earlier
from visattn import apply
from visattn.files import write_json
from visattn.report_text import headline
from visattn.timing import per_call
from visattn.watch import Watched

MODES = ("eager", "compiled")
STOCK, DENSE = "stock", "dense"
# Seconds that a turn of a contender lasts at least, seconds of all rounds, and the fewest and most of them.
TURN_S, SECONDS, TURNS = 0.05, 45.0, (5, 250)

Shapes = Counter[tuple[torch.Size, torch.Size]]


def attended(model: torch.nn.Module, step: Callable[[], Any]) -> Shapes:
    """Shapes of q and k of every self-attention call of a step."""
    found: Shapes = Counter()

    def see(watched: Watched) -> None:
        found[watched.q.shape, watched.k.shape] += 1

    with apply(model, DENSE) as handle:
        handle.watch(see)
        step()
    return found


def attention_ms(shapes: Shapes, device: str, dtype: torch.dtype) -> float:
    """Milliseconds of these calls by torch's attention, each shape in a queue of its own: what bounds the gain."""
    total = 0.0
    for (of_q, of_k), count in shapes.items():
        q, k, v = (torch.randn(s, device=device, dtype=dtype).transpose(1, 2) for s in (of_q, of_k, of_k))
        run = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v)  # noqa: E731
        per_call(run, 3)
        total += count * statistics.median(per_call(run, 20) for _ in range(5))
    return 1e3 * total


def copies(model: torch.nn.Module, names: list[str], twice: bool) -> list[tuple[str, torch.nn.Module]]:
    """Models of their own that share the weights of one; of twice as many, the second ones in the opposite order."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [(name, copy.deepcopy(model, dict(shared))) for name in (names + names[::-1] if twice else names)]


def timed(step: Callable[[], Any], count: int) -> tuple[float, float]:
    """Milliseconds of a step, of so many in a row: by the wall clock, and of this thread's work until it is queued.

    The second leaves out what other work of the machine takes from the first, where the host is what a step waits for.
    """
    worked = 0.0

    def work() -> None:
        nonlocal worked
        begun = time.thread_time()
        for _ in range(count):
            step()
        worked = time.thread_time() - begun

    return 1e3 * per_call(work, 1) / count, 1e3 * worked / count


def in_turns(steps: list[Callable[[], Any]]) -> list[list[tuple[float, float]]]:
    """Milliseconds of each step in every round, see `timed`."""
    took = []
    for step in steps:
        # Compilation and plans, then what a step takes.
        per_call(step, 2)
        took.append(per_call(step, 4))
    once = statistics.median(took)
    count = max(1, min(20, round(TURN_S / once)))
    rounds = max(TURNS[0], min(TURNS[1], round(SECONDS / (len(steps) * once * count))))
    times: list[list[tuple[float, float]]] = [[] for _ in steps]
    order, shuffle = list(range(len(steps))), random.Random(0).shuffle
    # What building and patching left is not collected while a step is timed.
    gc.collect()
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            times[i].append(timed(steps[i], count))
    return times


def median_of(values: list[float]) -> tuple[float, tuple[float, float]]:
    """The median of a sample, and the interval that holds that of its population in 95 of 100 samples (by ranks)."""
    ranked, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = math.floor(len(values) / 2 - half), math.ceil(len(values) / 2 + half)
    return statistics.median(values), (ranked[max(0, low)], ranked[min(len(values) - 1, high)])


def ratios(of: list[float], to: list[float]) -> tuple[float, tuple[float, float]]:
    """The median of the ratios of each round, and its interval."""
    return median_of([a / b for a, b in zip(of, to, strict=True)])


def compared(attention: str, times: list[tuple[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    """What a row says of an attention beside the stock one."""

    def of(name: str, which: int) -> list[list[float]]:
        return [[each[which] for each in rounds] for contender, rounds in times if contender == name]

    def mean(name: str, which: int) -> list[float]:
        return [statistics.fmean(each) for each in zip(*of(name, which), strict=True)]

    row: dict[str, Any] = {"attention": attention, "rounds": len(times[0][1])}
    (stock, stock_host), (own, host) = ((mean(name, 0), mean(name, 1)) for name in (STOCK, attention))
    row |= {"stock_ms": statistics.median(stock), "ms": statistics.median(own)}
    row |= {"stock_host_ms": statistics.median(stock_host), "host_ms": statistics.median(host)}
    row["speedup"], row["speedup_95"] = ratios(stock, own)
    row["host_ratio"], row["host_ratio_95"] = ratios(host, stock_host)
    control = of(STOCK, 0)
    return row | ({"control": ratios(*control)[0]} if len(control) == 2 else {})


def write_profiles(folder: Path, steps: Iterable[tuple[str, Callable[[], Any]]], of: str) -> None:
    """Where a step spends its time, of the host and of the GPU, one file for each attention."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, step in dict(steps).items():
        text = f"{kernels(step)}\n{profiled(step, 2)}"
        file = re.sub(r"[^a-z0-9]+", "-", f"{of} {name}".lower()).strip("-")
        (folder / f"{file}.txt").write_text(text)


def measure(
    name: str, modes: list[str], tiny: bool, left: Callable[[], float], profiles: Path | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a model, mode by mode."""
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    model, inputs = build(MODELS[name], device, dtype, tiny)
    step_of = lambda model: lambda: model(**inputs, return_dict=False)[0]  # noqa: E731
    assert step_of(model)().isfinite().all(), name
    bound = attention_ms(attended(model, step_of(model)), device, dtype)
    attentions = [DENSE, *MODELS[name].patterns]
    for mode in [mode for mode in MODES if mode in modes]:
        if left() <= 0:
            print(f"out of time before {name}, {mode}", flush=True)
            return
        # Each copy that is compiled is compiled anew.
        models = copies(model, [STOCK, *attentions], twice=mode == "eager")
        with contextlib.ExitStack() as stack:
            handles = {of: stack.enter_context(apply(each, of)) for of, each in models if of != STOCK}
            if mode == "compiled":
                for _, each in models:
                    each.compile_repeated_blocks(fullgraph=True, dynamic=False)  # type: ignore[operator]
            steps = [(of, step_of(each)) for of, each in models]
            found = in_turns([step for _, step in steps])
            times = [(of, rounds) for (of, _), rounds in zip(steps, found, strict=True)]
            rows = []
            for attention in attentions:
                row = {"model": name, "mode": mode, "attention_ms": bound} | compared(attention, times)
                rows.append(row | {"report": headline(handles[attention].report().to_dict())})
                print(json.dumps(rows[-1]), flush=True)
            if profiles is not None:
                write_profiles(profiles, steps, f"{name} {mode}")
        yield rows


def keep(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows to a file, in the order of the models; they replace those of the same model, attention and mode.

    Raises:
        ValueError: If the file has rows of another GPU or of other versions.
    """
    old = (earlier(out, about) or {"rows": []})["rows"]
    by_key = {(row["model"], row["attention"], row["mode"]): row for row in [*old, *rows]}
    order = list(MODELS)
    merged = sorted(by_key.values(), key=lambda row: (order.index(row["model"]), MODES.index(row["mode"])))
    write_json(out, about | {"rows": merged})


def machine(tiny: bool) -> dict[str, Any]:
    """What the times depend on."""
    found = {"diffusers": version("diffusers"), "python": sys.version.partition(" ")[0]}
    if tiny:
        return found | {"torch": torch.__version__}
    from scripts.gpu_common import versions

    return versions() | found


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; unknown models and modes end the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="default all")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES), help="default both")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, help="JSON file, merged into if it exists")
    parser.add_argument("--profiles", type=Path, help="folder for what takes a step's time, on a GPU")
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, keep."""
    options = parse_arguments(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    about: dict[str, Any] = {"command": "python3 -m scripts.bench.real_models_gpu " + shlex.join(given)}
    about["versions"] = machine(options.tiny)
    try:
        earlier(options.out, about)
    except ValueError as error:
        sys.exit(str(error))
    end, failed = time.perf_counter() + options.budget, 0
    left = lambda: end - time.perf_counter()  # noqa: E731
    for name in options.models:
        if time.perf_counter() > end:
            print(f"out of time before {name}")
            break
        try:
            with torch.no_grad():
                for rows in measure(name, options.modes, options.tiny, left, options.profiles):
                    if options.out:
                        keep(options.out, rows, about)
        except Exception as error:
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}"[:2000], flush=True)
        # Compiled blocks hold on to their model in cycles.
        torch._dynamo.reset()
        gc.collect()
        if not options.tiny:
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
