"""What perturbed-attention guidance does to the emoji model's pictures: are they named right, how do they look?

    python -m scripts.measure.guidance --out out/guidance.json --device cuda [--size 256] [--seconds 120]
    python -m scripts.measure.guidance --picture docs/pictures/guidance.png --prompts 6 --size 64 --steps 16

Each row draws the same prompts from the same noise with one kind of guidance. The judge (scripts.measure.emoji_encoder)
names each picture out of all prompts; `score` is the mean cosine of pictures and their own prompts. What the file has
is not measured again; `--seconds` begins no row after so long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from PIL import Image

from scripts import cli
from scripts.continued import earlier
from scripts.measure.emoji_encoder_model import ENCODER, DualEncoder, load_encoder
from scripts.measure.emoji_judge import shares
from visattn import apply, guide
from visattn.canvas import Picture, column, row, text
from visattn.environment import devices, versions
from visattn.files import write_json, written_whole
from visattn.pipelines.embedded.prompts import tokenize
from visattn.pipelines.load import load_pipeline

NAMES = (
    "red apple, 3d; bus, gradient; smiling cat, flat; rocket, 3d; snowman, flat; guitar, high contrast; "
    "penguin, 3d; post office, gradient; green apple, flat; banana, 3d; bicycle, gradient; book, flat; candle, "
    "3d; castle, gradient; cherries, 3d; cloud, flat; crab, 3d; crown, gradient; door, flat; dragon, 3d; eye, "
    "flat; fire, 3d; frog, gradient; ghost, flat; hammer, 3d; hospital, gradient; key, flat; lemon, 3d; lion, "
    "gradient; mushroom, 3d; octopus, flat; panda, 3d; pizza, gradient; rainbow, flat; ship, 3d; skull, flat; "
    "tiger, gradient; tomato, 3d; train, gradient; umbrella, 3d"
)
PROMPTS = tuple(name.strip() for name in NAMES.split(";"))
SHOWN = 96


def others(known: Sequence[str]) -> tuple[str, ...]:
    """The prompts that are not among those given, nor part of one of them."""
    return tuple(prompt for prompt in PROMPTS if not any(prompt in each for each in known))


class Variant(NamedTuple):
    """One kind of guidance.

    Attributes:
        guidance: Scale of classifier-free guidance, 1 for none.
        scale: Of perturbed attention, 0 for none.
        perturb: The perturbation.
        pattern: Attention of all predictions.
        heads: Heads of layers that are perturbed, None for all heads of the middle layers.
        strength: How much of the perturbation they get.
    """

    guidance: float = 1.0
    scale: float = 0.0
    perturb: str = "identity"
    pattern: str = "dense"
    heads: Mapping[str, Sequence[int]] | None = None
    strength: float = 1.0

    def __str__(self) -> str:
        guided = [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        guided += [f"{self.scale:g} x {self.perturb}"] if self.scale else []
        return f"{' + '.join(guided) or 'unguided'}, {self.pattern}"


def variants(pattern: str) -> list[Variant]:
    """What is measured, dense and under a pattern."""
    found = []
    for each in ("dense", pattern):
        found += [Variant(pattern=each), Variant(4.5, pattern=each)]
        for cfg in (1.0, 4.5):
            found += [Variant(cfg, scale, pattern=each) for scale in (0.3, 1.0, 3.0)]
            found += [Variant(cfg, 3.0, "blur", each), Variant(cfg, 1.0, "na(window=3x3)", each)]
    return found


DRAWN = (
    Variant(),
    Variant(scale=1.0),
    Variant(scale=3.0),
    Variant(4.5),
    Variant(4.5, 1.0),
    Variant(4.5, 3.0),
    Variant(4.5, 3.0, "blur"),
)


def draw(pipe: Any, variant: Variant, prompts: Sequence[str], options: argparse.Namespace) -> torch.Tensor:
    """Pictures [N, 3, H, W], values 0 to 1; the noise of each is that of its number."""
    found = []
    with ExitStack() as stack:
        handle = stack.enter_context(apply(pipe, variant.pattern, always=True))
        if variant.scale:
            heads = {"heads": variant.heads, "strength": variant.strength}
            stack.enter_context(guide(pipe, variant.scale, variant.perturb, handle=handle, **heads))
        for first in range(0, len(prompts), options.batch):
            some = list(prompts[first : first + options.batch])
            noise = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
            size = {"height": options.size, "width": options.size, "num_inference_steps": options.steps}
            made = pipe(some, generator=noise, guidance_scale=variant.guidance, output_type="pt", **size).images
            found.append(made.float().cpu())
    return torch.cat(found)


def cosines(pictures: torch.Tensor, prompts: Sequence[str], pipe: Any, encoder: DualEncoder) -> torch.Tensor:
    """How near pictures are to their own prompts, by the judge: [N], float64."""
    ids = tokenize(pipe.tokenizer, prompts).to(encoder.heat.device)
    said = torch.nn.functional.normalize(encoder.caption(ids).float(), dim=1).double().cpu()
    return (encoder.features(pictures) * said).sum(1)


def judged(pictures: torch.Tensor, prompts: Sequence[str], pipe: Any, encoder: DualEncoder) -> dict[str, Any]:
    """How many are named right, and how near they are to their prompts."""
    own = cosines(pictures, prompts, pipe, encoder)
    ranks = encoder.ranks(pictures, tokenize(pipe.tokenizer, prompts))
    return shares(ranks) | {"score": float(own.mean()), "score_error": float(own.std() / len(own) ** 0.5)}


def sheet(pipe: Any, options: argparse.Namespace, pattern: str) -> Picture:
    """A row for each kind of guidance, dense and, of some, under the pattern."""
    parts = []
    sparse = [DRAWN[0]._replace(pattern=pattern), DRAWN[4]._replace(pattern=pattern)]
    for variant in (*DRAWN, *sparse):
        made = draw(pipe, variant, PROMPTS[: options.prompts], options)
        pixels = (255 * made.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
        drawn = [Image.fromarray(each).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS) for each in pixels]
        parts += [text(str(variant), size=13), row(drawn, gap=4)]
        print(variant, flush=True)
    return column(parts, gap=4, margin=8)


def measure(pipe: Any, options: argparse.Namespace) -> None:
    """Writes the rows that are missing."""
    start, encoder = time.monotonic(), load_encoder(ENCODER, options.device)[0]
    prompts = PROMPTS[: options.prompts]
    settings = {name: getattr(options, name) for name in ("size", "steps", "prompts")} | {"device": options.device}
    report: dict[str, Any] = {"settings": settings, "versions": versions(), "devices": devices(), "rows": {}}
    report = earlier(options.out, report, options.device) or report
    for variant in variants(options.pattern):
        if str(variant) in report["rows"]:
            continue
        if options.seconds and time.monotonic() - start > options.seconds:
            print(f"stopped after {options.seconds:g} s: the same command goes on", flush=True)
            break
        found = judged(draw(pipe, variant, prompts, options), prompts, pipe, encoder)
        report["rows"][str(variant)] = variant._asdict() | found
        print(
            variant, f"{found['top1']:.0%} named, score {found['score']:.3f} +- {found['score_error']:.3f}", flush=True
        )
        write_json(options.out, report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--out", type=cli.file_to_write, help="JSON file")
    asked.add_argument("--picture", type=cli.file_to_write, help="PNG file")
    parser.add_argument("--prompts", type=cli.count, default=len(PROMPTS), help="how many of the list")
    parser.add_argument("--pattern", default="na(window=16x16,stride=8x8)", help="of the sparse rows")
    parser.add_argument("--size", type=cli.count, default=256, help="side in pixels")
    parser.add_argument("--steps", type=cli.count, default=24)
    parser.add_argument("--batch", type=cli.count, default=20, help="pictures at once")
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--threads", type=cli.count, default=1)
    parser.add_argument("--seconds", type=cli.number, default=0.0, help="begin no row after so long; 0: no limit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipe: Any = load_pipeline("emoji", options.device)
    pipe.set_progress_bar_config(disable=True)
    with cli.told("measure_guidance"), cli.only_writer(options.out):
        if options.out is not None:
            measure(pipe, options)
            return
        made = sheet(pipe, options, options.pattern)
    with written_whole(options.picture) as path:
        made.quantize(256).save(path, format="png", optimize=True)


if __name__ == "__main__":
    main()
