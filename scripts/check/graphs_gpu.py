"""torch.compile and CUDA graphs around every pattern of the Triton kernels, on a real GPU.

    python3 -m scripts.check.graphs_gpu [--out FILE]

For each pattern: a captured CUDA graph of the forward, and of a whole training step, replayed on new inputs, gives
what eager gives; the model compiled by inductor (whole graph, no breaks) gives eager's results, twice two
grids are compiled twice and never again; the same with inductor's own CUDA graphs. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from scripts.gpu_common import go_on, measure_cases, versions
from visattn import Layout, attention, clear_caches, parse
from visattn.patterns import ListedPattern

HEADS, DIM = 4, 64
# Relative difference of compiled and eager results: inductor keeps more bits between operators.
LIMIT = 2e-2
CASES: dict[str, tuple[str, list[Layout], bool]] = {
    "na": ("na(window=9x9)", [Layout((24, 20), 5), Layout((17, 30), 5)], True),
    "clear, pooled keys": ("clear(radius=6,pool=4)", [Layout((24, 20), 0, 9), Layout((16, 33))], False),
    "radial": ("radial(decay=0.3)", [Layout((4, 12, 10)), Layout((5, 9, 16), 7)], False),
    "routing": ("routing(regions=4x4,topk=3)", [Layout((24, 20)), Layout((17, 30), 3)], False),
    "agent": ("agent(agents=5x5)", [Layout((25, 20)), Layout((15, 30))], True),
    "linear, elu": ("linear(feature=elu)", [Layout((24, 20), 1), Layout((17, 30))], True),
    "linear, hedgehog": ("linear(feature=hedgehog)", [Layout((24, 20)), Layout((17, 30))], False),
}


class Block(nn.Module):
    """Projections around attention, as in a transformer; the grid is an argument."""

    def __init__(self, pattern: str) -> None:
        """Take the text of a pattern."""
        super().__init__()
        self.pattern, self.listed = pattern, isinstance(parse(pattern), ListedPattern)
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: torch.Tensor, layout: Layout, mask: torch.Tensor | None) -> torch.Tensor:
        """Tokens [B, S, C] to tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
        # Problems this small would be left to SDPA.
        backend = "triton" if self.listed else "auto"
        out = attention(q, k, v, self.pattern, layout, key_mask=mask, backend=backend)
        return x + self.out(out.flatten(2))


class Model(nn.Module):
    """Two blocks on each of several grids."""

    def __init__(self, pattern: str, layouts: list[Layout]) -> None:
        """Take the text of a pattern and all layouts of a step."""
        super().__init__()
        self.blocks, self.layouts = nn.ModuleList([Block(pattern), Block(pattern)]), layouts

    def forward(self, xs: list[torch.Tensor], masks: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """Tokens of each layout."""
        results = []
        for x, mask, layout in zip(xs, masks, self.layouts, strict=True):
            for block in self.blocks:
                x = block(x, layout, mask)
            results.append(x)
        return results


def inputs_of(layouts: list[Layout], masked: bool, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Tokens, and key masks or None."""
    made = torch.Generator("cuda").manual_seed(seed)
    xs = [torch.randn(2, n.length, HEADS * DIM, generator=made, device="cuda", dtype=torch.bfloat16) for n in layouts]
    return xs, [torch.rand(x.shape[:2], generator=made, device="cuda") > 0.2 if masked else None for x in xs]


def trained(
    model: Callable[..., list[torch.Tensor]], parameters: Sequence[torch.Tensor], *inputs: Any
) -> list[torch.Tensor]:
    """Outputs and gradients of one step."""
    outs = model(*inputs)
    first, *others = (out.float().square().mean() for out in outs)
    return [*outs, *torch.autograd.grad(sum(others, first), list(parameters))]


def replayed(step: Callable[..., list[torch.Tensor]], layouts: list[Layout], masked: bool) -> dict[str, Any]:
    """Capture a step on some inputs, replay it on others; relative differences to eager, which itself must repeat."""
    held, new = inputs_of(layouts, masked, 1), inputs_of(layouts, masked, 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*held)
    for a, b in zip([*held[0], *held[1]], [*new[0], *new[1]], strict=True):
        if a is not None and b is not None:
            a.copy_(b)
    graph.replay()
    torch.cuda.synchronize()
    eager, again = step(*new), step(*new)
    wrong = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(results, eager, strict=True)]
    repeats = all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))
    # Products of torch may take other kernels in a capture: the bits are eager's up to rounding.
    return {"right": max(wrong) < LIMIT, "errors": [round(w, 6) for w in wrong], "eager repeats": repeats}


def compiled(model: Model, masked: bool, mode: str | None) -> dict[str, Any]:
    """Compile a model, compare with eager in a few steps; graphs that were compiled in the first and later steps."""
    torch._dynamo.reset()
    counters.clear()
    # The compiled code is to make its plans itself.
    clear_caches()
    fast = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    parameters, worst, graphs = list(model.parameters()), 0.0, []
    for seed in (3, 4, 5):
        inputs = inputs_of(model.layouts, masked, seed)
        with torch.no_grad():
            pairs = [([t.clone() for t in fast(*inputs)], model(*inputs))]
        pairs.append(([t.clone() for t in trained(fast, parameters, *inputs)], trained(model, parameters, *inputs)))
        for ours, truth in pairs:
            wrong = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(ours, truth, strict=True)]
            worst = max(worst, *wrong)
        graphs.append(counters["stats"]["unique_graphs"])
    skips = counters["inductor"]["cudagraph_skips"]
    # One graph without gradients, one with.
    right = worst < LIMIT and skips == 0 and graphs == [2] * 3
    return {"error": worst, "graphs": graphs, "expected": 2, "cudagraph_skips": skips, "right": right}


def grids_compiled(pattern: str, layouts: list[Layout]) -> dict[str, Any]:
    """Compile one block and call it with two grids in turns; each grid is to be compiled once."""
    torch._dynamo.reset()
    counters.clear()
    block = torch.compile(Block(pattern).cuda().to(torch.bfloat16), fullgraph=True, dynamic=False)
    graphs = []
    for seed in range(3):
        xs, _ = inputs_of(layouts, False, seed)
        with torch.no_grad():
            for x, layout in zip(xs, layouts, strict=True):
                block(x, layout, None)
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "expected": len(layouts), "right": graphs == [len(layouts)] * 3}


def check(name: str) -> dict[str, Any]:
    """Everything about one pattern."""
    pattern, layouts, masked = CASES[name]
    torch.manual_seed(0)
    model = Model(pattern, layouts).cuda().to(torch.bfloat16)
    parameters = list(model.parameters())

    def forward(*inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return model(*inputs)

    parts: dict[str, Callable[[], Any]] = {
        "graph, forward": lambda: replayed(forward, layouts, masked),
        "graph, step": lambda: replayed(lambda *i: trained(model, parameters, *i), layouts, masked),
        "compiled": lambda: compiled(model, masked, None),
        "compiled, CUDA graphs": lambda: compiled(model, masked, "reduce-overhead"),
        "grids": lambda: grids_compiled(pattern, layouts),
    }
    found = {}
    for part, run in parts.items():
        begin = time.perf_counter()
        try:
            found[part] = run()
        except Exception as error:
            torch.cuda.synchronize()
            where = traceback.extract_tb(error.__traceback__)[-1]
            found[part] = {
                "right": False,
                "failed": f"{where.filename}:{where.lineno} {type(error).__name__}: {error}"[:500],
            }
        found[part]["seconds"] = round(time.perf_counter() - begin, 1)
        print(f"{'ok' if found[part]['right'] else 'WRONG':<6}{name:<20}{part:<24}{found[part]}", flush=True)
    return found


def main() -> int:
    """Check all patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON file; its other cases stay")
    chosen = parser.parse_args()
    report: dict[str, Any] = {"versions": versions(), "cases": {}}
    go_on(report, chosen.out)
    measure_cases(chosen.only, check, report, chosen.out, math.inf)
    return int(any(not part["right"] for name in chosen.only for part in report["cases"][name].values()))


if __name__ == "__main__":
    sys.exit(main())
