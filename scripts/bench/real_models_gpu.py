"""Denoising steps of the published diffusers models with random weights: stock against patched, eager and compiled.

    python3 -m scripts.bench.real_models_gpu [--models "SDXL 1024" ...] [--modes eager] [--budget 480] [--out FILE]

bf16, no gradient; 80 GB hold the largest. Contenders are one model, patched and undone in turns; a time is the median
of the turns, each of some steps in a row with one wait at the end, and a speedup the median of those of each turn. What
is compiled are the blocks (`compile_repeated_blocks`). First calls (compilation, plans) come before and are not timed.
Rows replace those of the same model, attention and mode in FILE. After `--budget` seconds no model and mode is begun.
`--tiny` runs small models on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from scripts.bench.real_models import MODELS, build
from scripts.calls_gpu import kernels, profiled
from visattn import apply
from visattn.timing import per_call
from visattn.watch import Watched

MODES = ("eager", "compiled")
STOCK, DENSE = "stock", "dense"
# Seconds that a turn of a contender lasts, seconds of all its turns, and the fewest and most of them.
TURN_S, CONTENDER_S, TURNS = 0.4, 14.0, (5, 25)

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


def patched(model: torch.nn.Module, attention: str) -> Any:
    """A context in which a model has its attention."""
    return contextlib.nullcontext() if attention == STOCK else apply(model, attention)


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


def in_turns(model: torch.nn.Module, step: Callable[[], Any], names: list[str]) -> dict[str, Any]:
    """Milliseconds of a step in every turn, see `timed`, and the report's first line, by attention."""
    said: dict[str, str] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    took = []
    for name in names:
        with patched(model, name):
            # Compilation and plans, then what a step takes.
            step()
            step()
            took.append(per_call(step, 4))
    once = statistics.median(took)
    count = max(1, min(20, round(TURN_S / once)))
    # What the host does beside comes and goes within seconds: many short turns where steps are short.
    turns = max(TURNS[0], min(TURNS[1], round(CONTENDER_S / (once * (count + 2)))))
    for turn in range(turns):
        for name in names[:: -1 if turn % 2 else 1]:
            with patched(model, name) as handle:
                per_call(step, 2)
                # What building and patching left is not collected while a step is timed.
                gc.collect()
                times[name].append(timed(step, count))
                said[name] = "" if handle is None else str(handle.report()).partition("\n")[0]
    return {name: (times[name], said[name]) for name in names}


def write_profiles(folder: Path, model: torch.nn.Module, step: Callable[[], Any], names: list[str], of: str) -> None:
    """Where a step spends its time, of the host and of the GPU, one file for each attention."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with patched(model, name):
            step()
            text = f"{kernels(step)}\n{profiled(step, 2)}"
        file = re.sub(r"[^a-z0-9]+", "-", f"{of} {name}".lower()).strip("-")
        (folder / f"{file}.txt").write_text(text)


def measure(
    name: str, modes: list[str], tiny: bool, left: Callable[[], float], profiles: Path | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a model, mode by mode."""
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    model, inputs = build(MODELS[name], device, dtype, tiny)
    step = lambda: model(**inputs, return_dict=False)[0]  # noqa: E731
    assert step().isfinite().all(), name
    bound = attention_ms(attended(model, step), device, dtype)
    attentions = [DENSE, *MODELS[name].patterns]
    # Compiled blocks stay compiled.
    for mode in [mode for mode in MODES if mode in modes]:
        if left() <= 0:
            print(f"out of time before {name}, {mode}", flush=True)
            return
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        found = in_turns(model, step, [STOCK, *attentions])
        rows = []
        for attention in attentions:
            (stock, _), (own, said) = found[STOCK], found[attention]
            (all_stock, stock_host), (all_ms, host) = (
                list(map(list, zip(*each, strict=True))) for each in (stock, own)
            )
            row: dict[str, Any] = {"model": name, "attention": attention, "mode": mode}
            row |= {"stock_ms": statistics.median(all_stock), "ms": statistics.median(all_ms)}
            row |= {"stock_host_ms": statistics.median(stock_host), "host_ms": statistics.median(host)}
            # Of neighbours in time: a slow minute hits both.
            row["speedup"] = statistics.median(a / b for a, b in zip(all_stock, all_ms, strict=True))
            rows.append(row | {"all_stock_ms": all_stock, "all_ms": all_ms, "attention_ms": bound, "report": said})
            print(json.dumps(rows[-1]), flush=True)
        if profiles is not None:
            write_profiles(profiles, model, step, [STOCK, *attentions], f"{name} {mode}")
        yield rows


def keep(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows to a file, in the order of the models; they replace those of the same model, attention and mode."""
    old = json.loads(out.read_text())["rows"] if out.exists() else []
    by_key = {(row["model"], row["attention"], row["mode"]): row for row in [*old, *rows]}
    order = list(MODELS)
    merged = sorted(by_key.values(), key=lambda row: (order.index(row["model"]), MODES.index(row["mode"])))
    out.write_text(json.dumps(about | {"rows": merged}, indent=1) + "\n")


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
