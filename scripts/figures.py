"""The figures of the README and of pages in docs: measure them again, and write them into the tables.

python -m scripts.figures measure          # all of them on this machine, into docs/results (keep it idle)
python -m scripts.figures measure cpu      # one of them
python -m scripts.figures render           # the tables from docs/results
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.figures_dynamic import dynamic_tables
from scripts.figures_emoji import emoji_tables
from scripts.figures_gpu import gpu_calls_table, gpu_peers_table, gpu_real_table, gpu_stack_table, gpu_table
from scripts.figures_models import model_tables
from scripts.pages import with_table
from scripts.results import RESULTS, ROOT, likeness, result, seconds, table, under_load

PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/emoji.md",
        "docs/animoji.md",
        "docs/timm.md",
        "docs/distillation.md",
        "docs/generate.md",
        "docs/performance.md",
        "docs/diffusers.md",
        "docs/dynamic.md",
    )
)

# What measures each result. {out} is its JSON file, {folder} a scratch folder that holds report.json.
COMMANDS = {
    "digits-dense": "python -m scripts.measure.digits --steps 8 --threads 1 --out {out}",
    "digits-sparse": 'python -m scripts.measure.digits --pattern "na(window=9x9)" --steps 8 --threads 1 --out {out}',
    "digits-halo": 'python -m scripts.measure.digits --pattern "halo(block=8x8, halo=2)" --steps 8 --threads 1 '
    "--out {out}",
    "generate-1024": 'visattn generate image --model digits --pattern "na(window=9x9)" --label 2,3,5,8 --compare '
    "--out {folder} --force",
    "generate-1024-halo": 'visattn generate image --model digits --pattern "halo(block=8x8, halo=2)" --label 2,3,5,8 '
    "--compare --out {folder} --force",
    "generate-4096": 'visattn generate image --model digits --pattern "na(window=9x9)" --size 128 --label 3 '
    "--compare --repeats 2 --out {folder} --force",
    "generate-video-na": 'visattn generate video --model moving-digits --pattern "na(window=7x7x7)" --label 3,7 '
    "--steps 16 --compare --out {folder} --force",
    "generate-video-na-4": 'visattn generate video --model moving-digits --pattern "na(window=7x7x7)" --label 3,7 '
    "--steps 16 --dense-steps 4 --compare --out {folder} --force",
    "generate-video-radial": 'visattn generate video --model moving-digits --pattern "radial(decay=0.5)" --label 3,7 '
    "--steps 16 --compare --out {folder} --force",
    "generate-emoji": 'visattn generate image --model emoji --prompt "bus, gradient" --prompt "post office, gradient" '
    '--pattern "na(window=16x16, stride=8x8)" --steps 12 --dense-steps 4 --compare --seed 1 --out {folder} --force',
    "generate-emoji-512": 'visattn generate image --model emoji --prompt "bus, gradient" --size 512 --seed 1 '
    '--pattern "na(window=16x16, stride=8x8)" --steps 6 --dense-steps 2 --compare --out {folder} --force',
    "moving-digits": 'python -m scripts.measure.moving_digits --pattern dense --pattern "radial(decay=0.5)" --pattern '
    '"na(window=7x7x7)" --pattern "na(window=3x9x9)" --per-class 1 --steps 8 --batch 5 --threads 1 --loss-clips 16 '
    "--out {out}",
    "cpu": "python -m scripts.bench.cpu --json {out} --force",
    "digits-vit": "python -m scripts.measure.digits_vit --out {out}",
    "timm-highres": "python -m scripts.bench.timm_models --out {out}",
    "moh": "python -m scripts.bench.moh --out {out}",
    "students": "python -m scripts.bench.students --threads 1 --process-time --out {out}",
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


def digits_table() -> str:
    """The embedded image model with dense and with sparse attention."""
    rows = []
    for tokens, name, read in ((1024, "", "sparse"), (1024, "-halo", "halo"), (4096, "", "")):
        report = result(f"generate-{tokens}{name}")
        if not name:
            recognized = _recognized("dense") if tokens == 1024 else ""
            rows.append([f"{tokens:,}", "dense", "100 %", *seconds(report, "dense"), "", recognized])
        pattern, density = f"`{report['pattern']}`", f"{report['density']:.1%}"
        rows.append([f"{tokens:,}", pattern, density, *seconds(report, "sparse"), likeness(report), _recognized(read)])
    head = ["tokens", "attention", "density", "time per image", "of it attention", "PSNR, SSIM to dense", "recognised"]
    return table(head, rows) + under_load("generate-1024", "generate-1024-halo", "generate-4096")


def _recognized(kind: str) -> str:
    found = result(f"digits-{kind}") if kind else {}
    return f"{found['recognized']} of {found['samples']}" if found else ""


def video_table() -> str:
    """The embedded video model with dense and with sparse attention."""
    rows = []
    names = [f"generate-video-{name}" for name in ("na", "na-4", "radial")]
    for name in names:
        report = result(name)
        if not rows:
            rows.append(["dense", "100 %", *seconds(report, "dense"), ""])
        steps = report["settings"]["dense_steps"]
        pattern = f"`{report['pattern']}`" + f", the first {steps} steps dense" * bool(steps)
        rows.append([pattern, f"{report['density']:.1%}", *seconds(report, "sparse"), likeness(report)])
    head = ["attention", "density", "time per video", "of it attention", "PSNR, SSIM to dense"]
    return table(head, rows) + under_load(*names)


def moving_digits_table() -> str:
    """How the videos of the embedded model are read and how they move."""
    found = result("moving-digits")
    rows = []
    for name, of in {"held-out real digits": found["real"], **found["patterns"]}.items():
        cells = [f"{of['video_rate']:.1%}", f"{of['frame_rate']:.1%}", f"{of['speed']:.2f}", f"{of['jerk']:.2f}"]
        cells += [f"{of['ink_change']:.1%}", f"{of['loss']:.4f}" if "loss" in of else ""]
        likeness = f"{of['psnr']:.1f} dB, {of['ssim']:.3f}" if "psnr" in of else ""
        rows.append([f"`{name}`" if "(" in name else name, *cells, likeness])
    head = ["", "videos read right", "frames", "speed, px", "jerk, px", "ink change per frame", "loss", "to dense"]
    return table(head, rows)


def cpu_table() -> str:
    """The CPU engine against dense SDPA."""
    rows = []
    for case in result("cpu")["rows"]:
        bound = [f"{case[key]:.1f}x" if case[key] else "" for key in ("flop_bound", "tile_bound")]
        spread = f"{case['ratio']:.1f}x ({case['ratio_low']:.1f} to {case['ratio_high']:.1f})"
        rows.append([case["case"], *bound, spread, f"{case['ms']:.1f} ms", f"{case['peer_ms']:.1f} ms"])
    return table(["case", "FLOP bound", "tile bound", "faster than the peer", "time", "peer's time"], rows)


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


def distilled_table(name: str = "distill-digits") -> str:
    """Students of the digits model before and after scripts.distill."""
    found = result(name)
    teacher = found["teacher"]
    cells = [
        f"{teacher['recognized']:.1%}",
        f"{teacher['frechet']:.1f}",
        "",
        "",
        f"{teacher['recognized_large']:.0%}",
        "",
    ]
    rows = [["dense (teacher)", *cells]]
    for student in found["students"].values():
        before, after, gap = student["before"], student["after"], student["recovered"]
        shares = ["no gap" if gap[key] is None else f"{gap[key]:.0%}" for key in ("recognized", "frechet")]
        rows.append(
            [
                f"`{student['pattern']}`",
                f"{before['recognized']:.1%} to {after['recognized']:.1%}",
                f"{before['frechet']:.0f} to {after['frechet']:.1f}",
                ", ".join(shares),
                f"{before['psnr']:.1f} to {after['psnr']:.1f} dB",
                f"{after['recognized_large']:.0%}",
                f"{student['steps']}",
            ]
        )
    head = [
        "attention",
        "read right",
        "Frechet distance",
        "gap recovered",
        "PSNR to the teacher",
        "at 4,096 tokens",
        "steps",
    ]
    return table(head, rows)


def distilled_vit_table() -> str:
    """Students of the ViT that reads digits before and after scripts.distill."""
    found, rows = result("distill-vit"), []
    for row in found["rows"]:
        cells = [f"{row['before'][key]:.1%} to {row['after'][key]:.1%}" for key in ("accuracy", "agreement")]
        rows.append([f"`{row['pattern']}`", *cells])
    return table(
        ["attention", "read right", "read as the teacher does"],
        [["dense (teacher)", f"{found['teacher']:.1%}", ""], *rows],
    )


def longer_video_table(*names: str) -> str:
    """The video model at more than its frames: dense, radial, and radial with LoRA."""
    rows = []
    for found in map(result, names):
        frames = str(found["settings"]["frames"])
        rows.append([frames, "held-out real digits", *_motion(found["real"]), "", ""])
        for name in ("dense", "radial(decay=0.5)", "radial(decay=0.5) + LoRA"):
            row = found["patterns"][name]
            density = re.search(r"density ([\d.]+)", row["report"])
            cells = [*_motion(row), f"{row['loss']:.4f}", f"{float(density[1]):.0%}" if density else "100%"]
            rows.append([frames, name, *cells])
    return table(
        ["frames", "attention", "frames read right", "jerk", "ink change", "loss on new clips", "density"], rows
    )


def _motion(row: dict[str, float]) -> list[str]:
    return [f"{row['frame_rate']:.1%}", f"{row['jerk']:.2f} px", f"{row['ink_change']:.1%}"]


def students_table() -> str:
    """What the attention of each student computes, and how long an image takes."""
    sizes, rows = list(result("students")["sizes"].values()), []
    for name in (key for key in sizes[0] if key != "tokens"):
        cells = ["dense" if name == "stock" else f"`{sizes[0][name]['pattern']}`"]
        for size in sizes:
            case, stock = size[name], size["stock"]["median"]
            faster = "" if name == "stock" else f": {stock / case['median']:.1f}x"
            cells += [f"{case['computed']:.1%}", f"{case['median']:.2f} s{faster}"]
        rows.append(cells)
    head = [cell for size in sizes for cell in (f"attention at {size['tokens']:,} tokens", "time per image")]
    return table(["attention", *head], rows)


TABLES: dict[str, Callable[[], str]] = {
    "digits": digits_table,
    "video": video_table,
    "moving-digits": moving_digits_table,
    "cpu": cpu_table,
    "gpu": gpu_table,
    "gpu-peers": gpu_peers_table,
    "gpu-stack": gpu_stack_table,
    "gpu-calls": gpu_calls_table,
    "gpu-real": gpu_real_table,
    "digits-vit": digits_vit_table,
    "timm": timm_table,
    "moh": moh_table,
    "distilled": distilled_table,
    "distilled-cpu": partial(distilled_table, "distill-digits-cpu"),
    "distilled-vit": distilled_vit_table,
    "longer-video": partial(longer_video_table, "extend-video-32", "extend-video-64"),
    "longer-video-cpu": partial(longer_video_table, "extend-video-32-cpu"),
    "students": students_table,
    **emoji_tables(),
    **dynamic_tables(),
    **model_tables(),
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


if __name__ == "__main__":
    main()
