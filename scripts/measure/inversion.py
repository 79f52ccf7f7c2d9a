"""How exactly the embedded emoji model finds the noise of a picture again, by each scheduler with an inverse.

    python -m scripts.measure.inversion --out docs/results/inversion.json [--steps 50] [--size 64] [--seconds 120]
    python -m scripts.measure.inversion --picture docs/pictures/inversion.png [--steps 24]

Each case draws a picture from noise in so many steps and goes back with the same prompt, guidance and pattern, all by
the pipeline itself, the model in float32. Errors are the largest of any value, as a share of the largest of states and
noise. `back` of a case is other attention on the way back. What the file has is not measured again; `--seconds` begins
no case after so long. The picture has what each scheduler draws from the same noise, a row for each guidance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from scripts import cli
from scripts.continued import earlier
from visattn import apply
from visattn.canvas import WHITE, Picture, column, row, text
from visattn.environment import devices
from visattn.files import write_json, written_whole
from visattn.pipelines.control.trajectory import EulerInverseScheduler
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.schedulers import BDIAInverseScheduler, BDIAScheduler, EDICTInverseScheduler, EDICTScheduler

PROMPT = "a red apple, 3d"
WINDOW, GUIDANCE = "na(window=8x8)", 4.5
# Name of a case, scheduler there and back, its options.
KINDS: dict[str, tuple[Any, Any, dict[str, float]]] = {
    "EDICT 0.93": (EDICTScheduler, EDICTInverseScheduler, {"mixing": 0.93}),
    "BDIA 1": (BDIAScheduler, BDIAInverseScheduler, {"gamma": 1.0}),
    "BDIA 0.92": (BDIAScheduler, BDIAInverseScheduler, {"gamma": 0.92}),
}
SHOWN, DRAWN = 128, (1.0, 2.0, GUIDANCE)
EULER = "Euler, run backwards"


def cases() -> list[dict[str, Any]]:
    """What is measured, in order."""
    found = []
    for kind in (*KINDS, EULER):
        for pattern in ("dense", WINDOW):
            for guidance in (1.0, GUIDANCE):
                found.append({"kind": kind, "pattern": pattern, "back": pattern, "guidance": guidance})
    return [*found, {"kind": "BDIA 1", "pattern": "dense", "back": WINDOW, "guidance": 1.0}]


def trip(pipe: Any, case: dict[str, Any], noise: torch.Tensor, steps: int) -> dict[str, Any]:
    """One way there and back; returns the error of the noise, and the largest value of the states."""
    config, start = pipe.scheduler.config, time.monotonic()
    size = {"height": noise.shape[2], "width": noise.shape[3]}

    def run(latents: torch.Tensor, pattern: str, output: str) -> torch.Tensor:
        options = {"num_inference_steps": steps, "guidance_scale": case["guidance"], "output_type": output}
        with apply(pipe, pattern, always=True) if pattern != "dense" else nullcontext():
            return pipe(PROMPT, latents=latents, callback_on_step_end=kept, **options, **size).images

    last: list[torch.Tensor] = []

    def kept(pipe: Any, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last[:] = [tensors["latents"]]
        return tensors

    plain = pipe.scheduler
    try:
        if case["kind"] == EULER:
            run(noise, case["pattern"], "pt")
            largest = last[0].abs().max().double()
            pipe.scheduler = EulerInverseScheduler.from_config(config)
            run(last[0], case["back"], "pt")
            found = last[0].double()
        else:
            forward, back, options = KINDS[case["kind"]]
            pipe.scheduler = there = forward.from_config(config, **options)
            run(noise, case["pattern"], "pt")
            state = there.state()
            largest = torch.stack([each.abs().max() for each in state]).max()
            pipe.scheduler = back.from_config(there.config)
            run(pipe.scheduler.set_state(state, steps).float(), case["back"], "pt")
            found = pipe.scheduler.state()[0]
    finally:
        pipe.scheduler = plain
    largest, error = torch.maximum(largest, noise.abs().max()), (found - noise).abs().max()
    return {"error": float(error / largest), "largest": float(largest), "seconds": round(time.monotonic() - start, 1)}


def picture(pipe: Any, noise: torch.Tensor, steps: int) -> Picture:
    """What each scheduler draws, a row for each guidance."""
    plain, kinds = pipe.scheduler, {"Euler": None, **KINDS}
    names = row([_wide(text(name, size=13)) for name in kinds], gap=4)
    rows = [names]
    for guidance in DRAWN:
        drawn = []
        for made in kinds.values():
            pipe.scheduler = plain if made is None else made[0].from_config(plain.config, **made[2])
            options = {"height": noise.shape[2], "width": noise.shape[3], "num_inference_steps": steps}
            found = pipe(PROMPT, latents=noise, guidance_scale=guidance, **options).images[0]
            drawn.append(found.resize((SHOWN, SHOWN), Image.Resampling.NEAREST))
        rows += [text(f"guidance {guidance:g}", size=13), row(drawn, gap=4)]
    pipe.scheduler = plain
    return column(rows, gap=4, margin=8)


def _wide(words: Picture) -> Picture:
    """Words above a picture."""
    made = Image.new("RGB", (SHOWN, words.height), WHITE)
    made.paste(words, (0, 0))
    return made


def measure(pipe: Any, noise: torch.Tensor, report: dict[str, Any], options: argparse.Namespace, start: float) -> None:
    """Adds the rows that a report lacks, and writes it after each."""
    done = [{name: row[name] for name in ("kind", "pattern", "back", "guidance")} for row in report["rows"]]
    order = [tuple(case.values()) for case in cases()]
    for case in cases():
        if case in done:
            continue
        if options.seconds and time.monotonic() - start > options.seconds:
            print(f"stopped after {options.seconds:g} s: the same command goes on", flush=True)
            break
        report["rows"].append({**case, **trip(pipe, case, noise, options.steps)})
        print(json.dumps(report["rows"][-1]), flush=True)
        report["rows"].sort(
            key=lambda each: order.index((each["kind"], each["pattern"], each["back"], each["guidance"]))
        )
        write_json(options.out, report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--out", type=cli.file_to_write, help="JSON file")
    asked.add_argument("--picture", type=cli.file_to_write, help="PNG file")
    parser.add_argument("--steps", type=cli.count, default=50)
    parser.add_argument("--size", type=cli.count, default=64, help="side in pixels")
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--threads", type=cli.count, default=1)
    parser.add_argument("--seconds", type=cli.number, default=0.0, help="begin no case after so long; 0: no limit")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    # As float32 on any device: states are in float64, and the model is what rounds.
    pipe: Any = load_pipeline("emoji", options.device, "float32")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)).to(options.device)
    if options.picture is not None:
        made = picture(pipe, noise, options.steps)
        with written_whole(options.picture) as path:
            made.quantize(256).save(path, format="png", optimize=True)
        return
    settings = {"steps": options.steps, "size": options.size, "prompt": PROMPT, "torch": torch.__version__}
    report: dict[str, Any] = {"settings": settings, "devices": devices(), "rows": []}
    with cli.told("inversion"), cli.only_writer(options.out):
        measure(pipe, noise, earlier(options.out, report, options.device) or report, options, start)


if __name__ == "__main__":
    main()
