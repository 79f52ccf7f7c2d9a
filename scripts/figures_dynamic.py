"""Tables of dynamic patterns: what they catch, what they do to pictures and clips, what they cost; if measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from scripts.results import RESULTS, result, table

# Tables by name, and the result that each is made of.
SOURCES = {
    "dynamic-mass": "dynamic-mass",
    "dynamic-errors": "dynamic-mass",
    "dynamic-pictures": "emoji-dynamic",
    "dynamic-clips": "animoji-dynamic",
    "dynamic-gpu": "h200-dynamic",
    "dynamic-hybrid": "h200-hybrid",
}
# Rows of static patterns begin with these.
STATIC = ("na(", "clear(", "radial(", "halo(", "best(of=[na(")


def dynamic_tables() -> dict[str, Callable[[], str]]:
    """The tables; those of pictures and clips say so where they have not been measured."""
    makers = {"dynamic-mass": mass_table, "dynamic-errors": errors_table, "dynamic-gpu": gpu_table}
    makers["dynamic-hybrid"] = hybrid_table
    return makers | {name: partial(quality_table, SOURCES[name]) for name in ("dynamic-pictures", "dynamic-clips")}


def mass_table() -> str:
    """Every line of the chart: density and what is caught at each of its points."""
    lines = result("dynamic-mass")["lines"]
    most = max(map(len, lines.values()))
    rows = []
    for name, points in sorted(lines.items(), key=lambda line: -_at_fifth(line[1])):
        cells = [f"{p['density']:.3f}: {p['mass']:.3f}" for p in points]
        rows.append([name, f"{_at_fifth(points):.3f}", *cells, *[""] * (most - len(cells))])
    return table(["line", "caught at 0.2", *[f"point {i + 1}" for i in range(most)]], rows)


def _at_fifth(points: list[dict[str, float]]) -> float:
    """What is caught at a density of a fifth, straight between the points on either side, or that of the nearest."""
    by_density = sorted((p["density"], p["mass"]) for p in points)
    below = [p for p in by_density if p[0] <= 0.2]
    above = [p for p in by_density if p[0] > 0.2]
    if not below or not above:
        return (above or below[::-1])[0][1]
    (low, first), (high, last) = below[-1], above[0]
    return first + (last - first) * (0.2 - low) / (high - low)


def errors_table() -> str:
    """Relative errors of outputs, the smallest first."""
    found = sorted(result("dynamic-mass")["outputs"].items(), key=lambda each: each[1]["error"])
    return table(
        ["pattern", "density", "error"],
        [[f"`{text}`", f"{each['density']:.3f}", f"{each['error']:.3f}"] for text, each in found],
    )


def quality_table(name: str) -> str:
    """Patterns of equal density on pictures or clips; the best static and dynamic one of each density in bold."""
    if not (RESULTS / f"{name}.json").is_file():
        return "Not measured."
    found = result(name)
    rows = [row for row in found["rows"].values() if "error" not in row]
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if "psnr" in row:
            best[_class(row)] = max(best.get(_class(row), 0.0), row["psnr"])
    cells = []
    for row in sorted(rows, key=lambda row: (row.get("dense_steps", 0), _near(row), -row.get("psnr", 99))):
        tops = [f"{row[kind]['top1']:.0%}" for kind in ("seen", "unseen")]
        distance = f"{sum(row[kind]['frechet'] for kind in ('seen', 'unseen')) / 2:.3f}"
        psnr = f"{row['psnr']:.2f}" if "psnr" in row else ""
        if psnr and row["psnr"] == best[_class(row)]:
            psnr = f"**{psnr}**"
        density = f"{row['density']:.1%}"
        cells.append([f"`{row['pattern']}`", str(row.get("dense_steps", 0)), density, psnr, *tops, distance])
    head = ["attention", "dense steps", "density", "PSNR, dB", "seen: top 1", "unseen: top 1", "Frechet, mean"]
    where = f"{found['settings']['device']}, {found['settings']['steps']} steps, {found['settings']['dtype']}."
    failed = [f"`{r['pattern']}` did not run: {r['error']}." for r in found["rows"].values() if "error" in r]
    return "\n\n".join([table(head, cells), *_distances(best), where, *failed])


def _distances(best: dict[tuple[Any, ...], float]) -> list[str]:
    """How far the best dynamic pattern is above the best static one, by dense steps and density."""
    found = []
    for dense_steps, density, static in sorted(best):
        other = best.get((dense_steps, density, False))
        if static and other is not None:
            behind = f" behind {dense_steps} dense steps" if dense_steps else ""
            more = other - best[dense_steps, density, True]
            found.append(
                f"At {density:.0%} of the pairs{behind} the best dynamic pattern is {more:.1f} dB above the best "
                "static one."
            )
    return [" ".join(found)] if found else []


def _class(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("dense_steps", 0), _near(row), row["pattern"].startswith(STATIC)


def _near(row: dict[str, Any]) -> float:
    """The density that a row stands for."""
    return min((0.1, 0.2, 0.3, 1.0), key=lambda each: abs(each - row["density"]))


def gpu_table() -> str:
    """Times of scripts/bench/dynamic_gpu.py, and of the backward where it was timed."""
    found = result("h200-dynamic")
    rows = []
    for case in found["cases"].values():
        parts, own = case["parts_ms"], case["ours"]["forward_ms"]
        choosing = f"{parts['choosing_and_lists']:.2f} ms, {case['choosing_share']:.1%}"
        fixed = f"{parts['kernel_fixed'] / parts['kernel']:.2f}" if "kernel_fixed" in parts else ""
        cells = [
            f"`{case['pattern']}`",
            case["layout"],
            f"{case['density']:.1%}",
            choosing,
            f"{parts['kernel']:.2f} ms",
        ]
        cells += [fixed, f"{own:.2f} ms", f"{case['cudnn']['forward_ms']:.1f} ms", f"{case['speedup']:.2f}x"]
        rows.append(cells)
    head = ["pattern", "grid", "density", "choosing, lists", "kernel", "fixed lists", "call", "cuDNN", "speed-up"]
    lines = [table(head, rows)]
    if (RESULTS / "h200-dynamic-backward.json").is_file():
        cases = result("h200-dynamic-backward")["cases"].values()
        lines += [
            f"Backward, `{case['pattern']}` on {case['layout']}: {case['ours']['backward_ms']:.1f} ms, cuDNN "
            f"{case['cudnn']['backward_ms']:.1f} ms: {case['cudnn']['backward_ms'] / case['ours']['backward_ms']:.2f}x."
            for case in cases
        ]
    if (RESULTS / "h200-dynamic-skip.json").is_file():
        lines.append(_skip())
    if (RESULTS / "h200-stack-dynamic.json").is_file():
        lines.append(_stack())
    return "\n\n".join(lines)


def hybrid_table() -> str:
    """Times of scripts/bench/hybrid_gpu.py: whole calls, their softmax branch, and both in 8 bits."""
    rows = []
    for case in result("h200-hybrid")["cases"].values():
        if "ms" in case:
            ms = case["ms"]
            cells = [f"`{case['pattern']}`", case["layout"], f"{ms['ours']:.2f} ms", f"{ms['front']:.2f} ms"]
            cells += [f"{ms['cudnn']:.1f} ms", f"{ms['cudnn'] / ms['ours']:.1f}x"]
            cells += [f"{ms['fp8']:.2f} ms, {ms['cudnn'] / ms['fp8']:.1f}x" if "fp8" in ms else ""]
            rows.append(cells)
    head = ["pattern", "grid", "call", "softmax branch alone", "cuDNN, dense", "speed-up", "in fp8"]
    return table(head, rows)


def _skip() -> str:
    """What the test in the loop takes, where nothing is passed over and where some blocks are."""
    cases = result("h200-dynamic-skip")["cases"].values()
    found = [
        f"along `{case['pattern']}`, with {case['density']:.0%} of the pairs left, {case['ours']['forward_ms']:.1f} ms"
        for case in cases
    ]
    dense = next(iter(cases))
    return (
        f"`skip` on {dense['layout']}, levels of blocks in queries and keys: {', '.join(found)}; cuDNN, dense, "
        f"{dense['cudnn']['forward_ms']:.1f} ms."
    )


def _stack() -> str:
    """What a sparse step of a stack of blocks takes, and so a video some of whose steps are dense."""
    dense, sparse = (case for case in result("h200-stack-dynamic")["cases"])
    faster = dense["model_ms"] / sparse["model_ms"]
    videos = [f"{1 / (share + (1 - share) / faster):.2f}x with {share:.0%} dense steps" for share in (0.2, 0.1)]
    grid, times = "x".join(map(str, dense["grid"])), [case["model_ms"] / 1e3 for case in (dense, sparse)]
    return (
        f"A stack of the size of Wan 1.3B on {grid}, random weights, compiled: a dense step {times[0]:.2f} s, along "
        f"`{sparse['pattern']}` {times[1]:.2f} s: {faster:.2f}x. That is {' and '.join(videos)} for the denoising of a "
        "video."
    )
