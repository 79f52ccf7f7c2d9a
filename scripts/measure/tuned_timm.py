"""Measures tuned schedules of timm models: a ViT that reads digits, and DINOv2's at 518 pixels with random weights.

    python -m scripts.measure.tuned_timm --what digits --out out/tuned-timm
    python -m scripts.measure.tuned_timm --what dinov2 --device cuda --out out/tuned-timm

`digits` may lose half a point of accuracy on digits that its training has not seen; one half of them is measured, the
other half verifies. Its model is trained first if it is not there (six minutes on two cores). `dinov2` has no weights
and noise for pictures: it is for the time at a signal-to-noise ratio of 20 dB. What is measured is in a journal in
--out, so that the same command goes on where it was stopped; a second run of the same is refused meanwhile.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts import cli
from visattn.environment import devices, precisions_of, versions
from visattn.files import write_json
from visattn.models.tuning.pictures import Pictures
from visattn.models.tuning.subject import BackboneSubject
from visattn.tuning.candidates import candidates, checked
from visattn.tuning.found import tuned
from visattn.tuning.goal import Goal
from visattn.tuning.journal import Journal
from visattn.tuning.measure import Measurer
from visattn.tuning.plan import Plan
from visattn.tuning.search import Search

DINOV2, SIDE, NOISE = "vit_small_patch14_dinov2.lvd142m", 518, 16
GOALS = {"digits": Goal(accuracy=0.5, held_out=290), "dinov2": Goal(psnr=20.0, held_out=8)}
# 16 x 16 tokens are few for blocks of 64.
SMALL = ("topk(keep={}, rest=mean, block=4x4)", "na(window={0}x{0})")


def digits(model: Path, batch: int) -> BackboneSubject:
    """The trained ViT on digits that its training has not seen."""
    from scripts.train.digits_data import upscale
    from scripts.train.digits_vit import make_if_missing
    from scripts.train.digits_vit_model import SIZE, load_vit, split

    make_if_missing(model)
    images, labels = split(seen=False)
    pictures = Pictures(lambda i: upscale(images[i : i + 1], SIZE)[0], len(labels), tuple(labels.tolist()), "digits")
    return BackboneSubject(load_vit(model), pictures, "digits-vit", batch)


def dinov2(device: str, batch: int, side: int = SIDE) -> BackboneSubject:
    """DINOv2's ViT with random weights on noise.

    The scales of its residual branches begin at 1e-5, with which no attention would matter to the output: they are 1.
    """
    import timm

    torch.manual_seed(0)
    model = timm.create_model(DINOV2.partition(".")[0], img_size=side, init_values=1.0).to(device)
    noise = torch.randn(NOISE, 3, side, side)
    return BackboneSubject(model, Pictures(noise.__getitem__, NOISE, None, "noise"), DINOV2, batch)


def measure(
    subject: BackboneSubject, goal: Goal, seeds: int, names: Sequence[str], options: argparse.Namespace
) -> None:
    """Search, and write the schedule and the results."""
    start, out = time.monotonic(), options.out / options.what
    plan = Plan(tuple(names), 1, seeds=seeds, quick=min(seeds, 64), checks=6)
    journal = Journal(out.with_suffix(".jsonl"), subject.about() | {"candidates": list(names)})

    def tell(what: str, done: int, of: int) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {what}: {done} of {of}", flush=True)

    measurer = Measurer(subject, plan, journal, start + options.seconds, tell)
    found = Search(measurer, goal).run()
    made = tuned(measurer, goal, found)
    made.write(out.with_suffix(".json"))
    rows = {"verified": dict(made.verified), "layers": {k: dict(v) for k, v in made.layers.items()}}
    results = {"about": subject.about(), "versions": versions(), "devices": devices(), "goal": str(goal)} | rows
    results |= {"rank_correlation": found.ranks, "missed": found.missed, "tried": found.tried}
    write_json(options.out / f"{options.what}-results.json", results)
    print(json.dumps(rows["verified"]), found.missed, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=sorted(GOALS), default="digits")
    parser.add_argument("--model", type=Path, default=Path("out/digits-vit/model.safetensors"), help="of the digits")
    parser.add_argument("--device", type=cli.device, default="cpu", help="of DINOv2's ViT")
    parser.add_argument("--batch", type=cli.count, default=8)
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--seconds", type=cli.number, default=500.0, help="nothing new is begun after so long")
    parser.add_argument("--out", type=Path, default=Path("out/tuned-timm"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with cli.told("tuned_timm"), cli.only_writer(options.out / f"{options.what}.jsonl"):
        if options.what == "digits":
            subject = digits(options.model, options.batch)
            small = [SMALL[0].format(keep) for keep in (0.1, 0.2, 0.3, 0.5, 0.7)]
            small += [SMALL[1].format(window) for window in (3, 5, 7, 9, 11, 13)]
            names, seeds = checked(small, subject.grid), 290
        else:
            subject = dinov2(options.device, options.batch)
            names, seeds = candidates(subject.grid, precisions=precisions_of(subject.device)), 8
        measure(subject, GOALS[options.what], seeds, names, options)


if __name__ == "__main__":
    main()
