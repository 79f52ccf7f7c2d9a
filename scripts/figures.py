"""The figures of the README: measure them again, and write them into its tables.

python scripts/figures.py measure          # all of them on this machine, into docs/results (keep it idle)
python scripts/figures.py measure cpu      # one of them
python scripts/figures.py render           # README.md's tables from docs/results
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"

# What measures each result. {out} is its JSON file, {folder} a scratch folder that holds report.json.
COMMANDS = {
    "digits-dense": "python scripts/measure_digits.py --steps 8 --threads 1 --out {out}",
    "digits-sparse": 'python scripts/measure_digits.py --pattern "na(window=9x9)" --steps 8 --threads 1 --out {out}',
    "generate-1024": 'visattn generate image --model digits --pattern "na(window=9x9)" --label 2,3,5,8 --compare '
    "--out {folder} --force",
    "generate-4096": 'visattn generate image --model digits --pattern "na(window=9x9)" --size 128 --label 3 '
    "--compare --repeats 2 --out {folder} --force",
    "cpu": "python scripts/bench_cpu.py --json {out} --force",
}


def measure(names: list[str]) -> None:
    """Run the commands of some results (all if none is named) and keep their JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or COMMANDS:
        folder, out = ROOT / "out" / name, RESULTS / f"{name}.json"
        words = shlex.split(COMMANDS[name].format(out=out, folder=folder))
        # The programs of this environment, whatever the shell's PATH says.
        words[0] = str(Path(sys.executable).with_name(words[0]))
        print("$", COMMANDS[name], flush=True)
        subprocess.run(words, cwd=ROOT, check=True)
        if (report := folder / "report.json").exists() and "{folder}" in COMMANDS[name]:
            out.write_text(report.read_text())


def result(name: str) -> dict[str, Any]:
    """A measured result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits_table() -> str:
    """The embedded model with dense and with neighborhood attention."""
    read = {kind: result(f"digits-{kind}") for kind in ("dense", "sparse")}
    rows = []
    for tokens in (1024, 4096):
        report = result(f"generate-{tokens}")
        times, mean = report["times"], report["mean"]
        for kind in ("dense", "sparse"):
            recognized = f"{read[kind]['recognized']} of {read[kind]['samples']}" if tokens == 1024 else ""
            rows.append(
                [
                    f"{tokens:,}",
                    "dense" if kind == "dense" else f"`{report['pattern']}`",
                    "100 %" if kind == "dense" else f"{report['density']:.1%}",
                    f"{times[kind]['seconds']:.2f} s",
                    f"{times[kind]['attention_seconds']:.2f} s",
                    "" if kind == "dense" else f"{mean['psnr']:.1f} dB, {mean['ssim']:.3f}",
                    recognized,
                ]
            )
    return table(
        ["tokens", "attention", "density", "time per image", "of it attention", "PSNR, SSIM to dense", "recognised"],
        rows,
    )


def cpu_table() -> str:
    """The CPU engine against dense SDPA."""
    rows = []
    for case in result("cpu")["rows"]:
        bound = [f"{case[key]:.1f}x" if case[key] else "" for key in ("flop_bound", "tile_bound")]
        spread = f"{case['ratio']:.1f}x ({case['ratio_low']:.1f} to {case['ratio_high']:.1f})"
        rows.append([case["case"], *bound, spread, f"{case['ms']:.1f} ms", f"{case['peer_ms']:.1f} ms"])
    return table(["case", "FLOP bound", "tile bound", "faster than the peer", "time", "peer's time"], rows)


def gpu_table() -> str:
    """The Triton engine against cuDNN, measured by scripts/bench_gpu.py."""
    rows = []
    for case in result("h100")["cases"].values():
        own, peer = case["triton"], case["cudnn"]
        ratios = [f"{peer[key] / own[key]:.1f}x" for key in ("forward_ms", "backward_ms")]
        times = f"{own['forward_ms']:.1f} ms, {peer['forward_ms']:.1f} ms"
        rows.append([f"`{case['pattern']}` on {case['layout']}", f"{case['tile_bound']:.1f}x", *ratios, times])
    return table(["case", "tile bound", "forward", "backward", "forward time, cuDNN's"], rows)


TABLES: dict[str, Callable[[], str]] = {"digits": digits_table, "cpu": cpu_table, "gpu": gpu_table}


def rendered(text: str) -> str:
    """The README with its tables made from docs/results."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no {begin} ... {end}")
        body = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def main() -> None:
    """Entry point."""
    action, *names = sys.argv[1:] or [""]
    unknown = [name for name in names if name not in COMMANDS]
    if action not in ("measure", "render") or unknown:
        raise SystemExit(f"{__doc__}\nresults: {', '.join(COMMANDS)}" + f"\nunknown: {unknown}" * bool(unknown))
    if action == "measure":
        measure(names)
    README.write_text(rendered(README.read_text()))


if __name__ == "__main__":
    main()
