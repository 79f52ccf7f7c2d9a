"""Kept launches of sla, sla2 and vsa on a real GPU: the bits of first calls, and what a call costs the host.

    python3 -m scripts.check.branches_gpu [--budget SECONDS] [--only NAME]

Calls on several tensors in turns, and on other memory while the first tensors hold NaN, must give the bits that
Triton's launcher gives where nothing is kept, without waiting for the device. Calls of four threads at once, and a
captured graph that is replayed on other values, give them up to the rounding of torch's products. Host times are
medians of turns in one process: with kept launches, with each launch looked up by its arguments, and by Triton's
launcher. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch

from scripts.calls_gpu import host_us, in_turns
from scripts.gpu_common import versions
from visattn import Layout, attention, clear_caches, parse
from visattn.keep import STORE
from visattn.kernels.triton import again, start

# Relative error of a replayed graph: its products may be computed by other kernels of torch.
LIMIT = 1e-2
SIDES = "block=8x16, key_block=8x8"


class Case(NamedTuple):
    """One call, and how many sets of its launches are kept if none is left to Triton's launcher."""

    text: str
    kept: int
    layout: Layout = Layout((64, 64))
    heads: int = 24
    kv_heads: int = 24
    dim: int = 128
    batch: int = 1
    masked: bool = False


JOINT = Layout((30, 37), prefix=7, suffix=77)
CASES = {
    "sla": Case(f"sla(keep=0.05, {SIDES})", 3),
    "vsa": Case(f"vsa(keep=0.05, {SIDES})", 2),
    "sla2": Case(f"sla2(keep=0.05, {SIDES})", 4),
    "sla marginal": Case(f"sla(keep=0.05, marginal=0.85, {SIDES})", 3),
    "sla2 mask": Case("sla2(keep=0.2, block=8x8)", 4, JOINT, 4, 2, 64, 2, True),
    "vsa mask": Case("vsa(keep=0.2, block=8x8)", 2, JOINT, 4, 2, 64, 2, True),
}


class Inputs(NamedTuple):
    """Tensors of a call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    parameters: dict[str, torch.Tensor]
    mask: torch.Tensor | None


def inputs_of(case: Case, seed: int) -> Inputs:
    """Random tensors and parameters."""
    made = torch.Generator("cuda").manual_seed(seed)
    pattern, layout = parse(case.text), case.layout

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, device="cuda")

    q, k, v = (
        normal(case.batch, layout.length, heads, case.dim).to(torch.bfloat16)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    initial = pattern.initial_parameters(case.heads, case.dim, layout.grid)
    parameters = {name: t.cuda() + normal(*t.shape) * case.dim**-0.5 for name, t in initial.items()}
    mask = torch.rand(case.batch, layout.length, generator=made, device="cuda") > 0.3 if case.masked else None
    return Inputs(q, k, v, parameters, mask)


def copied(given: Inputs) -> Inputs:
    """The same on other memory."""
    q, k, v, parameters, mask = given
    own = {name: t.clone() for name, t in parameters.items()}
    return Inputs(q.clone(), k.clone(), v.clone(), own, None if mask is None else mask.clone())


def call(case: Case, given: Inputs) -> torch.Tensor:
    """One attention call."""
    q, k, v, parameters, mask = given
    with torch.no_grad():
        return attention(q, k, v, case.text, case.layout, parameters=parameters, key_mask=mask)


@contextmanager
def looked_up() -> Iterator[None]:
    """Inside, no launches of a call are started together: each is looked up by its arguments."""
    with mock.patch.object(again.Again, "__call__", lambda self, *given, **lists: None):
        yield


@contextmanager
def by_triton() -> Iterator[None]:
    """Inside, Triton's launcher starts the kernels of second branches and choices."""
    with looked_up(), mock.patch.object(start, "startable", lambda device: False):
        yield


def fresh(case: Case, given: Inputs) -> torch.Tensor:
    """What a call gives where nothing is kept."""
    clear_caches()
    with by_triton():
        found = call(case, given)
    clear_caches()
    return found


def checked(case: Case) -> list[str]:
    """What is wrong with a case."""
    sets = [inputs_of(case, seed) for seed in range(3)]
    wanted = [fresh(case, given) for given in sets]
    problems = []
    for turn in range(3):
        for i, (given, right) in enumerate(zip(sets, wanted, strict=True)):
            if not torch.equal(call(case, given), right):
                problems.append(f"turn {turn} differs on tensors {i}")
    kept = sum(isinstance(entry.value, again.Again) for entry in STORE.entries())
    if kept < case.kept:
        problems.append(f"{kept} sets of launches are kept, expected {case.kept}: Triton's launcher starts the others")
    # Behind kept addresses the first tensors hold nothing any more.
    moved = copied(sets[0])
    for t in (*sets[0][:3], *sets[0].parameters.values()):
        t.fill_(float("nan"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = call(case, moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not torch.equal(found, wanted[0]):
        problems.append("it differs on other memory")
    sets[0] = moved
    return problems + threaded(case, sets, wanted) + replayed(case, sets, wanted)


def threaded(case: Case, sets: list[Inputs], wanted: list[torch.Tensor]) -> list[str]:
    """What is wrong with calls of several threads at once."""
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = call(case, sets[i % len(sets)])
                torch.cuda.current_stream().synchronize()
                error = relative(found, wanted[i % len(sets)])
                if not error < LIMIT:
                    wrong.append(i)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    return [f"threads {sorted(set(wrong))} are off"] if wrong else []


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative error."""
    return float((found.float() - right.float()).norm() / right.float().norm())


def replayed(case: Case, sets: list[Inputs], wanted: list[torch.Tensor]) -> list[str]:
    """What is wrong with a captured call, beside an eager one on another stream."""
    static = copied(sets[0])
    call(case, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, static)
    problems = []
    for other, right in zip(sets[1:], wanted[1:], strict=True):
        for a, b in zip(static[:3], other[:3], strict=True):
            a.copy_(b)
        for name, t in static.parameters.items():
            t.copy_(other.parameters[name])
        if static.mask is not None and other.mask is not None:
            static.mask.copy_(other.mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = call(case, other)
        graph.replay()
        torch.cuda.synchronize()
        errors = relative(out, right), relative(beside, right)
        if not max(errors) < LIMIT:
            problems.append(f"replayed, and eager beside it: off by {errors[0]:.1e}, {errors[1]:.1e}")
    return problems


def timed(case: Case) -> dict[str, float]:
    """Microseconds that a call keeps the host, with and without kept launches, in turns."""
    work = partial(call, case, inputs_of(case, 0))

    def inside(way: Callable[[], AbstractContextManager[None]]) -> float:
        with way():
            return host_us(work)

    return in_turns(
        {
            "kept": partial(host_us, work),
            "looked up": partial(inside, looked_up),
            "by Triton": partial(inside, by_triton),
        }
    )


def main() -> int:
    """Check and time all cases within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=50, help="seconds after which no case begins")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    chosen = parser.parse_args()
    print(versions(), flush=True)
    begin, wrong, done = time.monotonic(), 0, 0
    for name, case in CASES.items():
        if chosen.only not in name or time.monotonic() - begin > chosen.budget:
            continue
        problems, us = checked(case), timed(case)
        wrong, done = wrong + bool(problems), done + 1
        times = ", ".join(f"{who} {value:.0f} us" for who, value in us.items())
        ratios = ", ".join(f"{us[who] / us['kept']:.2f}x" for who in us if who != "kept")
        print(f"{'WRONG' if problems else 'ok':<6}{name}: {times} ({ratios})", *problems, sep="; ", flush=True)
    print(f"{done - wrong} of {done} right, {time.monotonic() - begin:.0f} s; {len(CASES)} in all")
    return int(wrong > 0 or not done)


if __name__ == "__main__":
    sys.exit(main())
