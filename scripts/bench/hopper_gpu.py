"""The Hopper kernels that ship against other ways to launch them, kernel by kernel, in turns in one process.

    python3 -m scripts.bench.hopper_gpu [--jobs 10] [--only flux-s1 ...] [--directions backward ...]
        [--budget 120] [--out FILE]

Each contender's results are compared with the shipped kernel's first. Milliseconds of one kernel, and of cuDNN's dense
forward and backward; what is left of the time when the budget is spent is not begun. Prints a line each, writes JSON.
`--jobs` compiles in that many processes first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.gpu import CASES as MAIN_CASES
from scripts.bench.gpu import compared, dense_by, in_turns
from scripts.gpu_common import compile_first, go_on, measure_cases, versions
from visattn import Layout, parse
from visattn.kernels.triton.config import DIRECTIONS, HOPPER, ONE_PASS, Config, config
from visattn.kernels.triton.hopper import launch as hopper_launch
from visattn.kernels.triton.prepared import Kernels
from visattn.problem import Call

HEADS = 24
# Name, pattern, layout, head dim.
FLUX = Layout((64, 64), prefix=512)
CASES: dict[str, tuple[str, Layout, int]] = {
    "flux-s16": (*MAIN_CASES["flux-s16"], 128),
    "flux-s1": (*MAIN_CASES["flux-s1"], 128),
    "clear16-256": (*MAIN_CASES["clear16-256"], 128),
    "flux64-na16": ("na(window=16x16,stride=8x8)", FLUX, 128),
    "flux64-na16-64": ("na(window=16x16,stride=8x8)", FLUX, 64),
    "dense-16k": (*MAIN_CASES["dense-16k"], 128),
    "flux-s16-64": (*MAIN_CASES["flux-s16"], 64),
    "dense-16k-64": (*MAIN_CASES["dense-16k"], 64),
    "hunyuan-s1": (*MAIN_CASES["hunyuan-s1"], 128),
    "flux-s1-64": (*MAIN_CASES["flux-s1"], 64),
    "wan-na": ("na(window=13x15x15)", Layout((21, 30, 52)), 128),
    "hunyuan-s16": (*MAIN_CASES["hunyuan-s16"], 128),
    "dense-64k": (*MAIN_CASES["dense-64k"], 128),
    "radial-wan": (*MAIN_CASES["radial-wan"], 128),
}


class Contender(NamedTuple):
    """A way to launch a kernel: its configuration, and constants of `hopper.launch` that differ."""

    launch: Config
    constants: Mapping[str, Any] = MappingProxyType({})


def contenders(dim: int) -> dict[str, dict[str, Contender]]:
    """Ways to run each direction by name, the shipped one first."""
    found = {}
    for direction, configs in HOPPER.items():
        shipped = configs[dim]
        whole = shipped._replace(halves=False)
        found[direction] = {"shipped": Contender(shipped), "whole rows": Contender(whole)}
        if direction != "forward":
            found[direction]["3 slots"] = Contender(shipped._replace(stages=3))
    whole = HOPPER["forward"][dim]._replace(halves=False)
    for turns, share in (("turns", 2.0), ("no turns", 0.0)):
        given = {"TAKE_TURNS": share}
        found["forward"] |= {
            turns: Contender(HOPPER["forward"][dim], given),
            f"whole rows, one arrival, {turns}": Contender(whole, given | {"GIVE_BACK_TOGETHER": True}),
        }
    # Lists of the general kernels know no halves.
    found["query_grad"]["general"] = Contender(config(90, torch.bfloat16, dim, "query_grad"))
    found["backward"] = {"shipped": Contender(HOPPER["key_grad"][dim])}
    if dim in ONE_PASS:
        one = ONE_PASS[dim]
        found["backward"] |= {f"one pass, {n} pairs": Contender(one, {"TOGETHER": n}) for n in (2, 4, 8, 24)}
        found["backward"]["one pass, 8 pairs, other order"] = Contender(one._replace(one_pass=2))
        found["backward"]["one pass, 8 pairs, 2 slots"] = Contender(one._replace(stages=2))
    return found


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of b from a."""
    return float((a.float() - b.float()).norm() / a.float().norm())


def _under(run: Callable[[], Any], constants: Mapping[str, Any]) -> Any:
    """Run with these constants of `hopper.launch`."""
    before = {name: getattr(hopper_launch, name) for name in constants}
    for name, value in constants.items():
        setattr(hopper_launch, name, value)
    try:
        return run()
    finally:
        for name, value in before.items():
            setattr(hopper_launch, name, value)


class Case:
    """One problem: its tensors, and runs of each direction under a configuration."""

    def __init__(self, pattern: str, layout: Layout, dim: int) -> None:
        made = torch.Generator("cuda").manual_seed(0)
        shape = (1, layout.length, HEADS, dim)
        self.q, self.k, self.v, self.grad = (
            torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        self._call = Call(parse(pattern), layout, dim**-0.5)
        base = {d: config(90, torch.bfloat16, dim, d) for d in DIRECTIONS}
        self._base = base | {d: HOPPER[d][dim] for d in HOPPER}
        kernels = self._kernels(self._base)
        self.out, self.lse = kernels.forward(self.q, self.k, self.v, None, None, True)

    def _kernels(self, configs: dict[str, Config]) -> Kernels:
        return Kernels(self.q, self.k, self.v, self._call, False, lambda *_: configs, lambda: None)

    def run(self, direction: str, way: Contender) -> Callable[[], Any]:
        """A function that starts the kernel of a direction and returns its results."""
        kernels = self._kernels(self._base | {"key_grad" if direction == "backward" else direction: way.launch})
        if direction == "forward":
            run = partial(kernels.forward, self.q, self.k, self.v, None, None, False)
            return partial(_under, run, way.constants)
        saved = self.q, self.k, self.v, None, self.out, self.lse
        wanted = direction in ("query_grad", "backward"), direction in ("key_grad", "backward"), False
        # The first call of these kernels, which decides what others like it do.
        kernels.work(self.q, self.k, self.v)
        run = partial(kernels.backward, saved, self.grad, None, wanted, None, None)
        return partial(_under, run, way.constants)


def measured(name: str, directions: list[str]) -> dict[str, Any]:
    """Differences and milliseconds of a case."""
    pattern, layout, dim = CASES[name]
    case = Case(pattern, layout, dim)
    result: dict[str, Any] = {"pattern": pattern, "layout": str(layout), "head_dim": dim}
    for direction, configs in contenders(dim).items():
        if direction not in directions:
            continue
        runs, failed, truth = {}, {}, None
        for label, way in configs.items():
            try:
                run = case.run(direction, way)
                found = [t for t in run() if isinstance(t, torch.Tensor)]
                again = [t for t in run() if isinstance(t, torch.Tensor)]
                truth = truth or found
                worst = max(off(a, b) for a, b in zip(truth, found, strict=True))
                same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
                if not worst <= 5e-3 or not same:
                    failed[label] = f"off by {worst:.2e}, {'equal' if same else 'different'} when repeated"
                else:
                    runs[label] = run
            except Exception as error:
                failed[label] = f"{type(error).__name__}: {error}"[:300]
        result[direction] = {"ms": in_turns(runs), "failed": failed}
        print(f"  {name:<16}{direction:<12}{result[direction]}", flush=True)
    result["cudnn"] = compared({"cudnn": dense_by(SDPBackend.CUDNN_ATTENTION, [case.q, case.k, case.v])})["cudnn"]
    print(f"  {name:<16}cudnn       {result['cudnn']}", flush=True)
    return result


def compile_part(names: list[str], directions: list[str], index: int, of: int) -> None:
    """Run every of-th contender of the cases once, which compiles it."""
    found = {name: contenders(CASES[name][2]) for name in names}
    todo = [(name, d, way) for name in names for d in directions for way in found[name][d].values()]
    for name, direction, way in todo[index::of]:
        # What does not run is reported where it is timed.
        with contextlib.suppress(Exception):
            Case(*CASES[name]).run(direction, way)()
            torch.cuda.synchronize()


def main() -> int:
    """Measure the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--directions", nargs="*", choices=[*DIRECTIONS, "backward"], default=[*DIRECTIONS, "backward"])
    parser.add_argument("--no-one-pass", action="store_true", help="without the backward in one pass")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.no_one_pass:
        ONE_PASS.clear()
    if chosen.compile:
        compile_part(chosen.only, chosen.directions, *map(int, chosen.compile.split("/")))
        return 0
    begin = time.perf_counter()
    report: dict[str, Any] = {"versions": versions(), "heads": HEADS, "cases": {}}
    go_on(report, chosen.out)
    if chosen.jobs > 1:
        compile_first(chosen.jobs)
        print(f"compiled at {time.perf_counter() - begin:.0f} s", flush=True)
    print(report["versions"], flush=True)

    def told(name: str) -> dict[str, Any]:
        result = measured(name, chosen.directions)
        print(f"{name} at {time.perf_counter() - begin:.0f} s", flush=True)
        return result

    measure_cases(chosen.only, told, report, chosen.out, begin + chosen.budget)
    return int(any(c[d]["failed"] for c in report["cases"].values() for d in chosen.directions if d in c))


if __name__ == "__main__":
    sys.exit(main())
