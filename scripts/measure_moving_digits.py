"""Measures whether the moving digits that the embedded video model makes can be read, and move smoothly.

    python scripts/measure_moving_digits.py --pattern dense --pattern "na(window=3x9x9)" --out moving-digits.json

A support vector machine learns frames of moving real digits, cut out around their center of ink. Its accuracy on
moving real digits that it never saw is printed beside the result, because no generator can be read better than that;
the same goes for the smoothness of the motion. Every pattern starts from the same noise.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits_data import real_digits
from measure_digits import TRAINING_DIGITS, pattern_of
from moving_digits_data import MovingDigits, centers_of, cut_out
from moving_digits_training import CLASSES, FRAMES, SIZE
from sklearn.svm import SVC

from visattn.pipelines.embedded import load_embedded
from visattn.pipelines.pixel_wan import PixelWanPipeline

REFERENCE_VIDEOS = 200


@dataclass(frozen=True, slots=True)
class Reader:
    """A classifier of digits cut out of frames, and what it and the motion figures say of real moving digits.

    Attributes:
        classifier: Reads rows of 64 values from 0 to 1.
        real: `figures` of held-out real digits on the move.
    """

    classifier: SVC
    real: dict[str, float]

    def read(self, videos: torch.Tensor) -> torch.Tensor:
        """Labels [B, T] of the frames of videos [B, 1, T, H, W] with values 0 to 1."""
        rows = cut_out(videos)
        labels = torch.as_tensor(self.classifier.predict(rows.flatten(0, 1).numpy()))
        return labels.unflatten(0, rows.shape[:2])


def train_reader(seed: int = 0) -> Reader:
    """Trains on frames of 1200 of the 1797 real digits, each flying twice, and tests on the others."""
    images, labels = real_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    seen, unseen = order[:TRAINING_DIGITS], order[TRAINING_DIGITS:]
    flying = MovingDigits(augment=0.6, digits=(images[seen], labels[seen]))
    videos, truth = flying.draw(2 * TRAINING_DIGITS, 2, SIZE, generator)
    rows = cut_out((videos + 1) / 2)
    classifier = SVC(C=10.0, gamma="scale").fit(rows.flatten(0, 1).numpy(), truth.repeat_interleave(2).numpy())
    held_out = MovingDigits(augment=0.6, digits=(images[unseen], labels[unseen]))
    videos, truth = held_out.draw(REFERENCE_VIDEOS, FRAMES, SIZE, generator)
    reader = Reader(classifier, {})
    return Reader(classifier, figures(reader, (videos + 1) / 2, truth))


def figures(reader: Reader, videos: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What can be said of videos [B, 1, T, H, W] with values 0 to 1 and the labels [B] that were asked for.

    `video_rate` is the share of videos whose most frequent reading is right, `frame_rate` that of single frames.
    In pixels, means over videos and frames: `speed` is the way of the center of ink from frame to frame, `jerk` the
    change of that way (a straight, even motion has 0, a bounce more). `ink_change` is the mean relative change of the
    amount of ink from frame to frame.
    """
    read = reader.read(videos)
    size = videos.shape[-1]
    centers = centers_of(videos) * size / 2
    way = centers.diff(dim=1)
    ink = videos.sum((1, 3, 4))
    return {
        "video_rate": (read.mode(1).values == labels).float().mean().item(),
        "frame_rate": (read == labels[:, None]).float().mean().item(),
        "speed": way.norm(dim=-1).mean().item(),
        "jerk": way.diff(dim=1).norm(dim=-1).mean().item(),
        "ink_change": (ink.diff(dim=1).abs() / ink[:, :-1].clamp_min(1e-6)).mean().item(),
    }


def make_videos(
    pipeline: PixelWanPipeline, pattern: str, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Videos [10 N, 1, T, H, W] with values 0 to 1, their labels [10 N], and visattn's report ("" if dense)."""
    labels = torch.arange(CLASSES).repeat_interleave(options.per_class)
    shape = (len(labels), 1, options.frames, SIZE, SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    made = []
    with pattern_of(pipeline, pattern, options.dense_steps) as handle:
        for some_labels, some_noise in zip(labels.split(options.batch), noise.split(options.batch), strict=True):
            output: Any = pipeline(
                some_labels,
                latents=some_noise,
                num_frames=options.frames,
                guidance_scale=options.guidance,
                num_inference_steps=options.steps,
                output_type="pt",
            )
            made.append(output.frames.float().cpu().transpose(1, 2))
        report = "" if handle is None else str(handle.report())
    return torch.cat(made), labels, report


def save_picture(videos: torch.Tensor, path: Path) -> None:
    """Saves a sheet: the frames of one video of each class in a row."""
    from PIL import Image

    sheet = videos.unflatten(0, (CLASSES, -1))[:, 0, 0].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    Image.fromarray((sheet * 255).round().clamp(0, 255).to(torch.uint8).numpy()).save(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generates with every pattern, reads and counts; returns settings and figures for the JSON file."""
    torch.set_num_threads(options.threads)
    reader = train_reader()
    loaded: Any = PixelWanPipeline.from_pretrained(options.model) if options.model else load_embedded("moving-digits")
    pipeline = loaded.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "torch": torch.__version__,
        "videos": CLASSES * options.per_class,
        "real": reader.real,
        "patterns": {},
    }
    print(_line("held-out real digits", reader.real), flush=True)
    for pattern in options.pattern or ["dense"]:
        start = time.perf_counter()
        videos, labels, report = make_videos(pipeline, pattern, options)
        seconds = time.perf_counter() - start
        if options.picture:
            save_picture(videos, options.picture.with_stem(f"{options.picture.stem}-{len(result['patterns'])}"))
        mine = figures(reader, videos, labels)
        result["patterns"][pattern] = mine | {"seconds": round(seconds, 1), "report": report}
        print(_line(pattern, mine), flush=True)
    return result


def _line(name: str, of: dict[str, float]) -> str:
    return (
        f"{name:<24} read right: {of['video_rate']:.1%} of videos, {of['frame_rate']:.1%} of frames; speed "
        f"{of['speed']:.2f} px, jerk {of['jerk']:.3f} px, ink change {of['ink_change']:.1%} per frame"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", action="append", help='visattn pattern or "dense"; may be given several times')
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="pipeline folder instead of the embedded model")
    parser.add_argument("--picture", type=Path, help="file for a sheet of frames; the pattern's number is added")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    try:
        found = measure(options)
    except ValueError as error:
        raise SystemExit(f"measure_moving_digits: {error}") from error
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
