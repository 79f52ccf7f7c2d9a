"""The figures of the README and of pages in docs: measure them again, and write them into the tables.

python -m scripts.figures measure          # all of them on this machine, into docs/results (keep it idle)
python -m scripts.figures measure cpu      # one of them
python -m scripts.figures render           # the tables, and the charts of tuned schedules, from docs/results
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.demo import IMAGES
from scripts.figures_choosing import choosing_tables
from scripts.figures_control import control_tables
from scripts.figures_dynamic import dynamic_tables
from scripts.figures_emoji import emoji_tables
from scripts.figures_gpu import (
    gpu_calls_table,
    gpu_causal_table,
    gpu_hopper_table,
    gpu_packages_table,
    gpu_parallel_table,
    gpu_peers_table,
    gpu_real_table,
    gpu_shapes_table,
    gpu_stack_table,
)
from scripts.figures_models import model_tables
from scripts.figures_precision import precision_tables
from scripts.figures_presets import presets_table
from scripts.figures_suites import draw_suites, suite_tables
from scripts.figures_trained import trained_tables
from scripts.figures_tuned import draw_all, tuned_tables
from scripts.pages import with_table
from scripts.results import RESULTS, ROOT, result, table

PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/emoji.md",
        "docs/animoji.md",
        "docs/timm.md",
        "docs/distillation.md",
        "docs/generate.md",
        "docs/gpu-notes.md",
        "docs/performance.md",
        "docs/diffusers.md",
        "docs/precision.md",
        "docs/inversion.md",
        "docs/guidance.md",
        "docs/choosing.md",
        "docs/cpu-engine.md",
        "docs/dynamic.md",
        "docs/dynamic-measured.md",
        "docs/parallel.md",
        "docs/tuning.md",
        "docs/trained.md",
    )
)

# What measures each result. {folder} is a scratch folder, {out} a JSON file in it; without {out} it holds report.json.
COMMANDS = {
    "generate-emoji": f"visattn generate image {shlex.join(IMAGES)} --out {{folder}} --force",
    "generate-emoji-512": 'visattn generate image --model emoji --prompt "bus, gradient" --size 512 --seed 1 '
    '--pattern "na(window=16x16, stride=8x8)" --steps 6 --dense-steps 2 --compare --out {folder} --force',
    "cpu": "python -m scripts.bench.cpu --json {out} --force",
    "digits-vit": "python -m scripts.measure.digits_vit --out {out}",
    "timm-highres": "python -m scripts.bench.timm_models --out {out}",
    "eightbit": "python -m scripts.measure.eightbit --steps 6 --out {out}",
    "inversion": "python -m scripts.measure.inversion --out {out}",
    "moh": "python -m scripts.bench.moh --out {out}",
}


def measure(names: list[str]) -> None:
    """Run the commands of some results (all if none is named) and keep their JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or COMMANDS:
        folder = ROOT / "out" / name
        # Not the result itself, which other machines have measured: a run that was stopped goes on with its own.
        out = folder / ("measured.json" if "{out}" in COMMANDS[name] else "report.json")
        folder.mkdir(parents=True, exist_ok=True)
        words = shlex.split(COMMANDS[name].format(out=out, folder=folder))
        # The programs of this environment, whatever the shell's PATH says.
        words[0] = str(Path(sys.executable).with_name(words[0]))
        print("$", COMMANDS[name], flush=True)
        subprocess.run(words, cwd=ROOT, check=True)
        out.replace(RESULTS / f"{name}.json")


def cpu_table() -> str:
    """The CPU engine against dense SDPA."""
    rows = []
    for case in result("cpu")["rows"]:
        bound = [f"{case[key]:.1f}x" if case[key] else "" for key in ("flop_bound", "tile_bound")]
        spread = f"{case['ratio']:.1f}x ({case['ratio_low']:.1f} to {case['ratio_high']:.1f})"
        rows.append([case["case"], *bound, spread, f"{case['ms']:.1f} ms", f"{case['peer_ms']:.1f} ms"])
    return table(["case", "FLOP bound", "tile bound", "faster than the peer", "time", "peer's time"], rows)


def cpu_chosen_table() -> str:
    """Ways to choose lists on a CPU: the share of dense attention's time that was estimated and that was measured."""
    rows = []
    for case in result("cpu-crossing-chosen")["rows"]:
        shape = f"{'x'.join(map(str, case['grid']))}{', smooth' * case['smooth']}"
        shape += f", {case['dtype']}" * (case["dtype"] != "float32")
        shape += f", batch {case['batch']}, {case['dim']} channels" * (case["batch"] > 1)
        estimated = f"{case['estimated_sparse_ms'] / case['estimated_dense_ms']:.2f}"
        runs = case["choice"]
        if runs == "applied":
            runs = f"dense, for {case['listed']:.2f} were listed: {case['applied_ms'] / case['dense_ms']:.2f}"
        rows.append([f"`{case['pattern']}`", shape, estimated, f"{case['sparse_ms'] / case['dense_ms']:.2f}", runs])
    return table(["pattern", "tokens", "estimated", "measured", "what apply runs"], rows)


def digits_vit_table() -> str:
    """What patterns cost the small ViT, before and after fine-tuning."""
    found, rows = result("digits-vit"), []
    steps = found["settings"]["fine_tuning"]["steps"]
    for row in found["rows"]:
        dense = row["pattern"] == "dense"
        name = "dense (stock)" if dense else f"`{row['pattern']}`"
        density = "" if row["density"] is None else "100 %" if dense else f"{row['density']:.0%}"
        rows.append([name, density, f"{row['as_trained']:.1%}", f"{row['fine_tuned']:.1%}"])
    return table(["attention", "density", "as trained, dense", f"after {steps} steps with it"], rows)


def timm_table() -> str:
    """Models of timm on large images, stock against swapped."""
    rows = []
    for case in result("timm-highres")["cases"].values():
        stock, swapped = case["stock"], case["swapped"]
        cells = [f"{case['name']}, {case['size']} px", f"{case['tokens']:,}"]
        for key in ("seconds", "attention"):
            first, second = (statistics.median(side[key]) for side in (stock, swapped))
            cells.append(f"{first:.1f} s to {second:.1f} s: {first / second:.1f}x")
        memory = " to ".join(f"{side['memory'] / 2**20:.0f} MiB" for side in (stock, swapped))
        rows.append([*cells, memory])
    return table(["model", "tokens", "forward, stock to swapped", "of it attention", "peak memory"], rows)


def moh_table() -> str:
    """One MoH attention layer with every head computed, and with unused ones left out."""
    found: dict[str, list[str]] = {}
    sizes: list[str] = []
    for row in result("moh")["rows"]:
        every, used = (row[key]["median"] for key in ("every", "used"))
        heads = f"{row['shared']} + {row['routed']} of {row['heads'] - row['shared']}"
        cells = found.setdefault(row["name"], [row["name"], heads])
        cells.append(f"{every * 1e3:.0f} ms to {used * 1e3:.0f} ms: {every / used:.1f}x")
        size = f"{row['tokens']:,} tokens"
        sizes += [size] if size not in sizes else []
    return table(["model", "heads of a token: shared + routed", *sizes], list(found.values()))


def distilled_vit_table() -> str:
    """Students of the ViT that reads digits before and after scripts.distill."""
    found = result("distill-vit")
    rows = [[f"`{row['pattern']}`", *_before_and_after(row)] for row in found["rows"]]
    return table(
        ["attention", "read right", "read as the teacher does"],
        [["dense (teacher)", f"{found['teacher']:.1%}", ""], *rows],
    )


def distilled_heads_table() -> str:
    """The same of students with fewer query heads, or key heads that several of them share."""
    found, rows = result("distill-heads"), []
    for row in found["rows"]:
        heads = ", ".join(
            f"{name}={value}" for name, value in row["heads"].items() if value not in (None, "even", "mean")
        )
        name = "dense" if row["pattern"] == "na(window=-1)" else f"`{row['pattern']}`"
        rows.append([name, f"`{heads}`", *_before_and_after(row)])
    return table(
        ["attention", "`convert_heads`", "read right", "read as the teacher does"],
        [["dense (teacher)", "", f"{found['teacher']:.1%}", ""], *rows],
    )


def _before_and_after(row: dict[str, Any]) -> list[str]:
    """What a student reads right, and as its teacher does, before and after it was taught."""
    return [f"{row['before'][key]:.1%} to {row['after'][key]:.1%}" for key in ("accuracy", "agreement")]


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "cpu-chosen": cpu_chosen_table,
    "gpu-packages": gpu_packages_table,
    "gpu-peers": gpu_peers_table,
    "gpu-shapes": gpu_shapes_table,
    "gpu-stack": gpu_stack_table,
    "gpu-calls": gpu_calls_table,
    "gpu-causal": gpu_causal_table,
    "gpu-hopper": gpu_hopper_table,
    "gpu-real": gpu_real_table,
    "gpu-parallel": gpu_parallel_table,
    "digits-vit": digits_vit_table,
    "timm": timm_table,
    "moh": moh_table,
    "distilled-vit": distilled_vit_table,
    "distilled-heads": distilled_heads_table,
    **emoji_tables(),
    **dynamic_tables(),
    **model_tables(),
    **tuned_tables(),
    "presets": presets_table,
    **choosing_tables(),
    **precision_tables(),
    **control_tables(),
    **suite_tables(),
    **trained_tables(),
}


def rendered(text: str) -> str:
    """A page with its tables made from docs/results."""
    for name, make in TABLES.items():
        if f"<!-- table: {name} -->" in text:
            text = with_table(text, name, make())
    return text


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """What to do, and with which results; an unknown one ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure", help="run what measures the results, then render")
    measuring.add_argument("names", nargs="*", metavar="NAME", help=f"out of {', '.join(COMMANDS)}; default all")
    actions.add_parser("render", help="write the tables from docs/results")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(getattr(options, "names", ())) - set(COMMANDS)):
        measuring.error(f"no result is named {', '.join(unknown)}: choose from {', '.join(COMMANDS)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    if options.action == "measure":
        measure(options.names)
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
    draw_all()
    draw_suites()


if __name__ == "__main__":
    main()
