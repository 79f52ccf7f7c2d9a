"""The tables of docs/precision.md: errors and pictures of 8 bits, and their times on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from scripts.results import RESULTS, result, table

NAMES = {"int8": "`int8`", "fp8": "`fp8`"}


def parts_table() -> str:
    """Relative errors on normal data, where each part alone is rounded and where all are."""
    errors = result("eightbit")["normal"]["errors"]
    head = ["", *next(iter(errors.values()))]
    return table(head, [[NAMES[name], *(f"{value:.4f}" for value in own.values())] for name, own in errors.items()])


def pictures_table() -> str:
    """Pictures of the emoji model in 8 bits, and the cosine of attention outputs."""
    rows = []
    for key, found in result("eightbit")["pictures"].items():
        pattern, _, prompt = key.partition(": ")
        both = [[found[name][way] for way in ("psnr", "psnr_later") if way in found[name]] for name in NAMES]
        cells = [f"`{pattern}`", prompt, *("; ".join(f"{own:.1f} dB" for own in each) for each in both)]
        seen = [f"{found[name]['cosine']:.5f}" if "cosine" in found[name] else "" for name in NAMES]
        rows.append([*cells, *seen])
    ways = [*(f"PSNR, {name}" for name in NAMES.values()), *(f"mean cosine, {name}" for name in NAMES.values())]
    return table(["pattern", "prompt", *ways], rows)


def gpu_precision_table() -> str:
    """Whole calls in 8 bits against our 16-bit forward and cuDNN, measured by scripts/bench/eightbit_gpu.py."""
    if not (RESULTS / "gpu-eightbit.json").exists():
        return "Not measured on a GPU yet."
    found, rows = result("gpu-eightbit"), []
    for case in found["cases"].values():
        if "ms" not in case:
            continue
        ms = case["ms"]
        cells = [f"`{case['pattern']}` on {case['layout']}, D {case['head_dim']}", f"{ms['cudnn']:.2f}"]
        cells.append(f"{ms['bf16']:.2f}: {ms['cudnn'] / ms['bf16']:.1f}x")
        for name in NAMES:
            times = f"{ms[name]:.2f}: {ms['cudnn'] / ms[name]:.1f}x, {ms['bf16'] / ms[name]:.2f}x bf16"
            cells.append(f"{times}, error {case[f'{name}_to_bf16']:.3f}")
        rows.append(cells)
    made, on = table(["case", "cuDNN dense, ms", "bf16", *NAMES.values()], rows), found["versions"]
    named = f"{on['gpu']}, torch {on['torch']}, triton {on['triton']}, cuDNN {on['cudnn']}"
    return f"{made}\n\n{named}; errors to bf16's output."


def precision_tables() -> dict[str, Callable[[], str]]:
    """Each table by its name."""
    return {
        "precision-parts": parts_table,
        "precision-pictures": pictures_table,
        "precision-gpu": gpu_precision_table,
    }
