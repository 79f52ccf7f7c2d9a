"""Measures how much of a model's attention patterns catch at a density, on its real queries and keys.

    python -m scripts.measure.dynamic_mass --out docs/results/dynamic-mass.json --chart docs/pictures/dynamic-mass.svg

The embedded emoji model draws pictures on the CPU with dense attention; at one step the queries, keys and values of its
attention modules are taken. Caught is the share of the exact attention of grid queries that falls on what a
pattern lists, text included, as the mean over modules, heads and queries (`mass` of a point); its density is the listed
share of the grid's pairs. The best possible of lists of blocks is that of the blocks that hold the most. The error is
that of the output, relative to the norm of the dense output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import visattn
from scripts import cli
from scripts.measure.dynamic_chart import draw_chart
from visattn import Layout, dense_mask, parse
from visattn.files import write_json
from visattn.kernels.heads import best_patterns
from visattn.patterns import Best, DynamicPattern, OrderedPattern
from visattn.patterns.choice.blocks import Blocks, inner, token_blocks
from visattn.patterns.choice.listening import listening
from visattn.patterns.choice.picks import Seen, number_of, pick_number
from visattn.pipelines.embedded import load_embedded
from visattn.pipelines.record import record as visattn_record
from visattn.problem import Call
from visattn.recorded import Recorded, load_recorded

KEEPS = (0.05, 0.1, 0.2, 0.3, 0.5)
# Lines of the chart: a name, and the patterns of its points.
DYNAMIC: dict[str, list[str]] = {
    "topk, mean": [f"topk(keep={keep})" for keep in KEEPS],
    "topk, parts(4x4)": [f"topk(keep={keep}, score=parts(4x4))" for keep in KEEPS],
    "topk, bounds": [f"topk(keep={keep}, score=bounds)" for keep in KEEPS],
    "topk per head, mean": [f"topk(keep={keep}, per=head)" for keep in KEEPS],
    "topk per head, parts(4x4)": [f"topk(keep={keep}, per=head, score=parts(4x4))" for keep in KEEPS],
    "topp, mean": [f"topp(p={p})" for p in (0.2, 0.4, 0.6, 0.8, 0.9)],
    "topp, parts(4x4)": [f"topp(p={p}, score=parts(4x4))" for p in (0.2, 0.4, 0.6, 0.8, 0.9)],
    "above, mean": [f"above(tau={tau})" for tau in (2.0, 1.5, 1.0, 0.5, 0.0)],
    "above, parts(4x4)": [f"above(tau={tau}, score=parts(4x4))" for tau in (2.0, 1.5, 1.0, 0.5, 0.0)],
}
for _name, _score in (("diagonal(8)",) * 2, ("lowbit(4)",) * 2, ("tree(2)",) * 2):
    DYNAMIC[f"topk, {_name}"] = [f"topk(keep={keep}, score={_score})" for keep in KEEPS[1:4]]
DYNAMIC["topk per all heads, mean"] = [f"topk(keep={keep}, per=all)" for keep in KEEPS[1:4]]
DYNAMIC["topk, shared by all heads"] = [f"topk(keep={keep}, share=all)" for keep in KEEPS[1:4]]
DYNAMIC["topk, blocks of 8x16 queries"] = [f"topk(keep={keep}, block=8x16, key_block=8x8)" for keep in KEEPS[1:]]
# Groups of tokens in the order of their content.
ORDERED: dict[str, list[str]] = {
    "kmeans, 64 and 128 clusters": [
        f"kmeans(queries=64, keys=128, p={p}, floor=0.0, start=10)" for p in (0.4, 0.6, 0.75, 0.85)
    ],
    "lsh, runs without samples": [f"lsh(planes=7, block={block}, samples=0)" for block in (256, 512, 1024)],
}
# One of several windows for each head.
HEADS: dict[str, list[str]] = {
    "best of square, column, row": [
        f"best(of=[na(window={side}x{side}, stride=4x4), na(window=-1x{far}), na(window={far}x-1)])"
        for side, far in ((20, 7), (28, 13), (36, 19))
    ],
}
STATIC = {
    "na": [f"na(window={n}x{n}, stride=8x8)" for n in (16, 24, 32, 48)],
    "clear": [f"clear(radius={n})" for n in (9, 13, 19, 26)],
}
BEST, BEST_OF_HEAD = "best possible per row", "best possible per head"
# What is compared by its output: lists alone, and with pooled keys for the rest.
OUTPUTS = [
    f"{rule}, rest={rest}{score})"
    for rule in ("topk(keep=0.1", "topk(keep=0.2", "topk(keep=0.3", "topk(keep=0.2, per=head", "above(tau=1.0")
    for score in ("", ", score=parts(4x4)")
    for rest in ("drop", "mean")
] + [
    "topk(keep=0.2, rest=slope)",
    "topk(keep=0.2, score=diagonal(8))",
    "topk(keep=0.2, per=all)",
    "topk(keep=0.2, share=all)",
    "topk(keep=0.2, skip=0.01)",
    "kmeans(queries=64, keys=128, p=0.7, floor=0.0, start=10)",
    "best(of=[na(window=28x28, stride=4x4), na(window=-1x13), na(window=13x-1)])",
    "lsh(planes=7, block=512, samples=256)",
    "na(window=24x24, stride=8x8)",
    "na(window=32x32, stride=8x8)",
]


class Point(NamedTuple):
    """What a pattern reaches: listed share of the grid's pairs, and share of the attention caught."""

    density: float
    mass: float


class Module(NamedTuple):
    """One attention call: queries, keys and values [1, S, H, D], where its tokens sit, and its scale."""

    site: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: Layout
    scale: float

    def weights(self) -> torch.Tensor:
        """Exact attention of the grid's queries: [H, tokens, S]."""
        at = inner(self.layout)
        logits = torch.einsum("qhd,khd->hqk", self.q[0, at], self.k[0]) * self.scale
        return logits.softmax(-1)


def record(prompt: str, seed: int, steps: int, step: int) -> list[Module]:
    """The attention calls of one step while the emoji model draws a picture."""
    pipeline: Any = load_embedded("emoji", torch_dtype=torch.float32)
    arguments = {"prompt": prompt, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
    # With guidance the prompt comes first in the batch, no prompt behind it.
    calls = visattn_record(pipeline, arguments, steps=(step,)).calls
    return [module_of(call) for call in calls if not call.call]


def module_of(call: Recorded) -> Module:
    """A recorded call, its first sample."""
    q, k, v = (t[:1].float() for t in (call.q, call.k, call.v))
    return Module(call.site, q, k, v, call.layout, call.scale)


def block_mass(module: Module, blocks: Blocks, weights: torch.Tensor) -> torch.Tensor:
    """Attention of each block of queries on each block of keys, the mean of its rows: [1, H, rows, columns]."""
    rows, columns = (token_blocks(blocks.grid, box, weights.device) for box in (blocks.queries, blocks.keys))
    heads, tokens = weights.shape[:2]
    grid = weights[:, :, inner(module.layout)]
    keyed = torch.zeros(heads, tokens, blocks.columns).index_add(2, columns, grid)
    summed = torch.zeros(heads, blocks.rows, blocks.columns).index_add(1, rows, keyed)
    return summed[None] / torch.bincount(rows)[:, None]


def text_mass(module: Module, blocks: Blocks, weights: torch.Tensor) -> torch.Tensor:
    """Attention of each block of queries on text, the mean of its rows: [1, H, rows]."""
    rows = token_blocks(blocks.grid, blocks.queries, weights.device)
    text = 1 - weights[:, :, inner(module.layout)].sum(-1)
    return torch.zeros(len(text), blocks.rows).index_add(1, rows, text)[None] / torch.bincount(rows)


def of_listed(mask: torch.Tensor, mass: torch.Tensor, text: torch.Tensor) -> Point:
    """Density and mass of listed blocks, where all blocks have equally many tokens."""
    caught = text + (mass * mask).sum(-1)
    return Point(mask.float().mean().item(), caught.mean().item())


def measure(modules: Sequence[Module]) -> dict[str, list[Point]]:
    """Points of every line, the mean over modules."""
    found: dict[str, list[list[Point]]] = {}
    start = time.perf_counter()
    for module in modules:
        weights = module.weights()
        known: dict[Blocks, tuple[torch.Tensor, torch.Tensor]] = {}
        for line, patterns in DYNAMIC.items():
            points = []
            for pattern in map(parse, patterns):
                assert isinstance(pattern, DynamicPattern)
                blocks = pattern.blocks(module.layout.grid)
                if blocks not in known:
                    known[blocks] = block_mass(module, blocks, weights), text_mass(module, blocks, weights)
                chosen = pattern.choose(module.q, module.k, module.layout, None, module.scale)
                points.append(of_listed(chosen.mask(0, blocks.columns), *known[blocks]))
            found.setdefault(line, []).append(points)
        mass, text = known[next(iter(known))]
        for line, pick in ((BEST, _best_of_row), (BEST_OF_HEAD, _best_of_head)):
            found.setdefault(line, []).append([of_listed(pick(mass, keep), mass, text) for keep in KEEPS])
        for line, patterns in ORDERED.items():
            found.setdefault(line, []).append([_ordered(module, pattern, weights) for pattern in patterns])
        for line, patterns in HEADS.items():
            found.setdefault(line, []).append([_heads(module, pattern, weights) for pattern in patterns])
        for line, patterns in STATIC.items():
            found.setdefault(line, []).append([_static(module, pattern, weights) for pattern in patterns])
        print(f"{module.site}: {time.perf_counter() - start:.0f} s", flush=True)
    return {line: [_mean(points) for points in zip(*each, strict=True)] for line, each in found.items()}


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(sum(values) / len(points) for values in zip(*points, strict=True)))


def _best_of_row(mass: torch.Tensor, keep: float) -> torch.Tensor:
    return pick_number(mass, Seen(), None, number_of(keep, mass.shape[-1]))


def _best_of_head(mass: torch.Tensor, keep: float) -> torch.Tensor:
    pairs = mass.flatten(2)[:, :, None]
    return pick_number(pairs, Seen(), None, number_of(keep, pairs.shape[-1])).view(mass.shape)


@lru_cache(8)
def _mask(text: str, layout: Layout) -> torch.Tensor:
    """Of a pattern that is the same for all calls."""
    return dense_mask(text, layout)


def _static(module: Module, text: str, weights: torch.Tensor) -> Point:
    at = inner(module.layout)
    mask = _mask(text, module.layout)[at]
    return Point(mask[:, at].float().mean().item(), (weights * mask).sum(-1).mean().item())


def _of_mask(module: Module, mask: torch.Tensor, weights: torch.Tensor) -> Point:
    """Density and mass of a mask over all tokens [H, S, S]."""
    at = inner(module.layout)
    return Point(mask[:, at, at].float().mean().item(), (weights * mask[:, at]).sum(-1).mean().item())


def _ordered(module: Module, text: str, weights: torch.Tensor) -> Point:
    pattern = parse(text)
    assert isinstance(pattern, OrderedPattern)
    groups = pattern.cluster(module.q, module.k, module.layout, None, module.scale)
    return _of_mask(module, pattern.token_mask(groups, module.layout)[0], weights)


def _heads(module: Module, text: str, weights: torch.Tensor) -> Point:
    pattern = parse(text)
    assert isinstance(pattern, Best)
    call = Call(pattern, module.layout, module.scale)
    chosen = best_patterns(module.q, module.k, module.v, call)[0].tolist()
    masks = [_mask(str(each), module.layout) for each in pattern.patterns]
    return _of_mask(module, torch.stack([masks[i] for i in chosen]), weights)


def _grid_density(module: Module, text: str) -> float:
    """Listed share of the grid's pairs of a pattern that has nothing to choose."""
    if parse(text).covers(module.layout.grid):
        return 1.0
    at = inner(module.layout)
    return _mask(text, module.layout)[at, at].float().mean().item()


def errors(modules: Sequence[Module], patterns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Relative error of the output and density of each pattern, means over modules."""
    found: dict[str, dict[str, float]] = {}
    for text in patterns:
        off, density = [], []
        for module in modules:
            given = (module.q, module.k, module.v)
            told: list[torch.Tensor] = []
            with listening(told.append):
                dense, out = (visattn.attention(*given, p, module.layout, scale=module.scale) for p in ("dense", text))
            off.append(((out - dense).norm() / dense.norm()).item())
            density.append(told[-1].mean().item() if told else _grid_density(module, text))
        found[text] = {"error": sum(off) / len(off), "density": sum(density) / len(density)}
    return found


def main(arguments: Sequence[str] | None = None, recorded: Callable[..., list[Module]] = record) -> dict[str, Any]:
    """Measure, write the result and the chart, and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--steps", type=cli.count, default=12)
    parser.add_argument("--step", type=int, default=4, help="the step whose attention is taken, at least 1")
    parser.add_argument("--recorded", type=Path, nargs="+", help="what `visattn record` wrote, instead of drawing")
    parser.add_argument("--every", type=cli.count, default=1, help="take every so-manieth call")
    parser.add_argument("--only", nargs="+", help="patterns whose outputs are compared; no lines are measured then")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chart", type=cli.file_to_write, help="the chart to draw, .svg")
    given = parser.parse_args(arguments)
    prompts = given.prompt or ["a red apple, 3d", "smiling cat, gradient"]
    if not 1 <= given.step < given.steps:
        raise SystemExit(f"--step {given.step} must be from 1 to {given.steps - 1}: a picture has steps 0 to that")
    start = time.perf_counter()
    if given.recorded:
        files = [load_recorded(path) for path in given.recorded]
        modules = [module_of(call) for calls, _ in files for call in calls if not call.call]
        prompts = [prompt for _, about in files for prompt in about["prompts"]]
    else:
        modules = [m for seed, prompt in enumerate(prompts) for m in recorded(prompt, seed, given.steps, given.step)]
    recorded_at = time.perf_counter()
    modules = modules[:: given.every]
    lines = {} if given.only else measure(modules)
    result = {
        "model": "emoji", "prompts": prompts, "steps": given.steps, "step": given.step,
        "modules": len(modules), "layout": str(modules[0].layout), "torch": torch.__version__,
        "seconds": {"drawing": recorded_at - start, "measuring": time.perf_counter() - recorded_at},
        "lines": {line: [point._asdict() for point in points] for line, points in lines.items()},
        "outputs": errors(modules, given.only or OUTPUTS),
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, result)
    if given.chart and lines:
        title = f"Attention caught, emoji model, step {given.step} of {given.steps}, {len(modules)} calls"
        draw_chart(given.chart, title, {line: list(points) for line, points in lines.items()})
    for line, points in lines.items():
        print(f"{line:<28}" + "  ".join(f"{p.density:.3f}: {p.mass:.3f}" for p in points))
    for text, value in result["outputs"].items():
        print(f"{text:<60}density {value['density']:.3f}, error {value['error']:.3f}")
    return result


if __name__ == "__main__":
    main()
