"""Measures whether the digits that the embedded model makes are read as the digits that were asked for.

    python -m scripts.measure.digits --pattern "na(window=9x9)" --dense-steps 2 --out digits.json

A support vector machine learns the real 8x8 digits; its own accuracy on real digits that it never saw is
printed beside the result, both as they are and after the same way up and down in size that made the training
pictures, because no generator can be read better than that.
"""

import argparse
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from sklearn.svm import SVC

from scripts import cli
from scripts.train.digits_data import downscale, real_digits, upscale
from visattn.files import write_json
from visattn.pipelines.embedded import load_embedded
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline

CLASSES = 10
TRAINING_DIGITS = 1200


@dataclass(frozen=True, slots=True)
class Reader:
    """A digit classifier and its accuracy on held-out real digits.

    Attributes:
        classifier: Reads rows of 64 values from 0 to 1.
        accuracy: On held-out digits as they are.
        round_trip_accuracy: On the same digits after `upscale` and `downscale`.
    """

    classifier: SVC
    accuracy: float
    round_trip_accuracy: float

    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Labels [B] of images [B, 1, H, W] with values -1 to 1."""
        return torch.as_tensor(self.classifier.predict(downscale(images).flatten(1).numpy()))


def train_reader(size: int, seed: int = 0) -> Reader:
    """Trains on 1200 of the 1797 real digits and tests on the other 597."""
    images, labels = real_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:TRAINING_DIGITS], order[TRAINING_DIGITS:]
    classifier = SVC(C=10.0, gamma="scale").fit(images[seen].flatten(1).numpy(), labels[seen].numpy())
    truth = labels[unseen].numpy()
    plain = (classifier.predict(images[unseen].flatten(1).numpy()) == truth).mean()
    round_trip = downscale(upscale(images[unseen], size)).flatten(1).numpy()
    return Reader(classifier, float(plain), float((classifier.predict(round_trip) == truth).mean()))


def make_digits(pipeline: PixelDiTPipeline, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images [10 N, 1, H, W] with values -1 to 1, their labels [10 N], and visattn's report ("" if dense)."""
    labels = torch.arange(CLASSES).repeat_interleave(options.per_class)
    noise_shape = (len(labels), 1, options.size, options.size)
    noise = torch.randn(noise_shape, generator=torch.Generator().manual_seed(options.seed))
    made = []
    with pattern_of(pipeline, options.pattern, options.dense_steps) as handle:
        for some_labels, some_noise in zip(labels.split(options.batch), noise.split(options.batch), strict=True):
            output: Any = pipeline(
                some_labels,
                latents=some_noise,
                guidance_scale=options.guidance,
                num_inference_steps=options.steps,
                height=options.size,
                width=options.size,
                output_type="pt",
            )
            made.append(output.images.float().cpu() * 2 - 1)
        report = "" if handle is None else str(handle.report())
    return torch.cat(made), labels, report


def pattern_of(pipeline: DiffusionPipeline, pattern: str, dense_steps: int) -> Any:
    """Context in which the pipeline runs with the pattern; "dense" is the model's own attention."""
    if pattern == "dense":
        return nullcontext()
    from visattn import apply

    return apply(pipeline, pattern, dense_steps=dense_steps, strict=True)


def save_picture(images: torch.Tensor, path: Path) -> None:
    """Saves a grid: one row for each class, up to ten images wide."""
    from PIL import Image

    rows = images.unflatten(0, (CLASSES, -1))[:, :10, 0]
    grid = ((rows + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    Image.fromarray(grid.numpy()).save(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generates, reads and counts; returns settings and figures for the JSON file."""
    torch.set_num_threads(options.threads)
    reader = train_reader(options.size)
    loaded: Any = PixelDiTPipeline.from_pretrained(options.model) if options.model else load_embedded("digits")
    pipeline = loaded.to(options.device)
    start = time.perf_counter()
    images, labels, report = make_digits(pipeline, options)
    seconds = time.perf_counter() - start
    right = reader.read(images) == labels
    if options.picture:
        save_picture(images, options.picture)
    return {
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "torch": torch.__version__,
        "reader_held_out_accuracy": round(reader.accuracy, 4),
        "reader_round_trip_accuracy": round(reader.round_trip_accuracy, 4),
        "samples": len(labels),
        "recognized": int(right.sum()),
        "rate": round(right.float().mean().item(), 4),
        "rate_per_class": {str(c): round(right[labels == c].float().mean().item(), 4) for c in range(CLASSES)},
        "seconds": round(seconds, 1),
        "report": report,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="dense", help='visattn pattern, e.g. "na(window=9x9)"')
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense")
    parser.add_argument("--size", type=cli.count, default=64, help="side in pixels")
    parser.add_argument("--steps", type=cli.count, default=16)
    parser.add_argument("--guidance", type=cli.number, default=2.0)
    parser.add_argument("--per-class", type=cli.count, default=20)
    parser.add_argument("--batch", type=cli.count, default=20)
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--model", type=Path, help="pipeline folder instead of the embedded model")
    parser.add_argument("--picture", type=cli.file_to_write, help="file for a grid of the samples")
    parser.add_argument("--out", type=cli.file_to_write, help="file for the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("measure_digits"):
        figures = measure(options)
    accuracy, round_trip = figures["reader_held_out_accuracy"], figures["reader_round_trip_accuracy"]
    print(f"reader on held-out real digits: {accuracy:.1%}, after up- and downscaling: {round_trip:.1%}")
    print("recognized per class: " + "  ".join(f"{c}: {rate:.0%}" for c, rate in figures["rate_per_class"].items()))
    print(f"{options.pattern}: {figures['recognized']} of {figures['samples']} = {figures['rate']:.1%}")
    if figures["report"]:
        print(figures["report"])
    if options.out:
        write_json(options.out, figures, indent=2)


if __name__ == "__main__":
    main()
