"""Measures whether the moving digits that the embedded video model makes can be read, and move smoothly.

    python -m scripts.measure.moving_digits --pattern dense --pattern "na(window=7x7x7)" --out moving-digits.json

A support vector machine learns frames of moving real digits, cut out around their center of ink. Its accuracy on
moving real digits that it never saw is printed beside the result, because no generator can be read better than that;
the same goes for the smoothness of the motion. Every pattern starts from the same noise; if "dense" is among them, the
others are compared with its videos. `--frames 32 --lora FOLDER --lora-pattern ...` measures what extend_video.py made.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.svm import SVC

from scripts import cli
from scripts.measure.digits import TRAINING_DIGITS, pattern_of
from scripts.train.digits_data import real_digits
from scripts.train.moving_digits import LORA_FILE, flow_matching_loss, load_lora, load_pipeline
from scripts.train.moving_digits_data import MovingDigits, centers_of, cut_out
from scripts.train.moving_digits_training import CLASSES, FRAMES, SIZE
from visattn.files import write_json
from visattn.metrics import psnr, ssim
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline
from visattn.pipelines.report.video_files import contact_sheet

REFERENCE_VIDEOS = 200
# Clips for the loss, far from the seeds of any training step.
LOSS_SEED = 987654321
# Options that say where files are.
PATHS = ("out", "picture", "model", "lora")


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


def train_reader(seed: int = 0, frames: int = FRAMES) -> Reader:
    """Trains on frames of 1200 of the 1797 real digits, each flying twice, and tests on `frames` of the others."""
    images, labels = real_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    seen, unseen = order[:TRAINING_DIGITS], order[TRAINING_DIGITS:]
    flying = MovingDigits(augment=0.6, digits=(images[seen], labels[seen]))
    videos, truth = flying.draw(2 * TRAINING_DIGITS, 2, SIZE, generator)
    rows = cut_out((videos + 1) / 2)
    classifier = SVC(C=10.0, gamma="scale").fit(rows.flatten(0, 1).numpy(), truth.repeat_interleave(2).numpy())
    held_out = MovingDigits(augment=0.6, digits=(images[unseen], labels[unseen]))
    videos, truth = held_out.draw(REFERENCE_VIDEOS, frames, SIZE, generator)
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


def autocast_of(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Context of everything that the model computes."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.autocast)


def make_videos(
    pipeline: PixelWanPipeline, pattern: str, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Videos [10 N, 1, T, H, W] with values 0 to 1, their labels [10 N], and visattn's report ("" if dense)."""
    labels = torch.arange(CLASSES).repeat_interleave(options.per_class)
    shape = (len(labels), 1, options.frames, SIZE, SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    made = []
    with pattern_of(pipeline, pattern, options.dense_steps) as handle, autocast_of(options):
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


@torch.no_grad()
def loss_of_new_clips(pipeline: PixelWanPipeline, pattern: str, options: argparse.Namespace) -> float:
    """Mean training loss of clips of real digits on new ways, every pattern with the same clips, times and noise."""
    clips, total = MovingDigits(options.device, augment=0.6), 0.0
    with pattern_of(pipeline, pattern, 0), autocast_of(options):
        for i in range(options.loss_clips):
            generator = torch.Generator().manual_seed(LOSS_SEED + i)
            videos, labels = clips.draw(1, options.frames, SIZE, generator)
            total += flow_matching_loss(pipeline.transformer, videos, labels, generator).item()
    return total / options.loss_clips


def likeness(videos: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """PSNR over all pixels of a video and SSIM of its frames against the dense videos, means over videos."""
    strips = [v.flatten(2, 3) for v in (videos, dense)]
    frames = [v.transpose(1, 2).flatten(0, 1) for v in (videos, dense)]
    return {"psnr": psnr(*strips).mean().item(), "ssim": ssim(*frames).mean().item()}


def save_picture(made: dict[str, torch.Tensor], labels: Sequence[int], per_class: int, path: Path) -> None:
    """Saves a sheet: for each of some labels, the frames of its first video under each pattern."""
    shown = {
        f"{label}, {name}": videos[label * per_class].permute(1, 2, 3, 0).numpy()
        for label in labels
        for name, videos in made.items()
    }
    contact_sheet(shown).save(path, optimize=True)


def check(options: argparse.Namespace) -> None:
    """Checks the options before anything is loaded.

    Raises:
        ValueError: If one does not fit the others.
    """
    for name in ("frames", "steps", "per_class", "batch", "loss_clips", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: pass 1 or more")
    if options.lora_pattern and not options.lora:
        raise ValueError("--lora-pattern needs --lora: pass the folder that extend_video.py wrote")
    if options.lora and not (options.lora / LORA_FILE).is_file():
        raise ValueError(f"--lora {options.lora} has no {LORA_FILE}: pass the folder that extend_video.py wrote")
    wrong = [label for label in options.picture_labels if not 0 <= label < CLASSES]
    if wrong:
        raise ValueError(f"--picture-labels has {wrong[0]}: pass labels from 0 to {CLASSES - 1}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generates with every pattern, reads and counts; returns settings and figures for the JSON file.

    Files are written after each pattern, so that a long run may be stopped. Patterns with LoRA come first.
    """
    check(options)
    torch.set_num_threads(options.threads)
    reader = train_reader(frames=options.frames)
    on_gpu = torch.device(options.device).type == "cuda"
    result: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key not in PATHS},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "videos": CLASSES * options.per_class,
        "real": reader.real,
        "patterns": {},
    }
    print(_line("held-out real digits", reader.real), flush=True)
    plain, tuned = options.pattern or ([] if options.lora_pattern else ["dense"]), options.lora_pattern or []
    made: dict[str, torch.Tensor] = {}
    for name, pattern in [*((f"{p} + LoRA", p) for p in tuned), *((p, p) for p in plain)]:
        pipeline: Any = load_pipeline(str(options.model)).to(options.device)
        pipeline.set_progress_bar_config(disable=True)
        if name != pattern:
            load_lora(pipeline, options.lora)
        start = time.perf_counter()
        made[name], labels, report = make_videos(pipeline, pattern, options)
        seconds = time.perf_counter() - start
        mine = figures(reader, made[name], labels) | {"loss": loss_of_new_clips(pipeline, pattern, options)}
        result["patterns"][name] = mine | {"seconds": round(seconds, 1), "report": report}
        for other in made:
            if other != "dense" and "dense" in made:
                result["patterns"][other] |= likeness(made[other], made["dense"])
        print(_line(name, result["patterns"][name]), flush=True)
        write(result, made, options)
    return result


def write(result: dict[str, Any], made: dict[str, torch.Tensor], options: argparse.Namespace) -> None:
    """Writes the files that were asked for."""
    if options.picture:
        save_picture(made, options.picture_labels, options.per_class, options.picture)
    if options.out:
        write_json(options.out, result, indent=2)


def _line(name: str, of: dict[str, float]) -> str:
    return (
        f"{name:<24} read right: {of['video_rate']:.1%} of videos, {of['frame_rate']:.1%} of frames; speed "
        f"{of['speed']:.2f} px, jerk {of['jerk']:.3f} px, ink change {of['ink_change']:.1%} per frame"
        + (f"; loss {of['loss']:.4f}" if "loss" in of else "")
        + (f"; to dense {of['psnr']:.1f} dB, {of['ssim']:.3f}" if "psnr" in of else "")
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", action="append", help='visattn pattern or "dense"; may be given several times')
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense")
    parser.add_argument("--frames", type=cli.count, default=FRAMES)
    parser.add_argument("--steps", type=cli.count, default=16)
    parser.add_argument("--guidance", type=cli.number, default=2.0)
    parser.add_argument("--per-class", type=cli.count, default=10)
    parser.add_argument("--batch", type=cli.count, default=10)
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--loss-clips", type=cli.count, default=64, help="clips of real digits for the loss")
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16 where torch's autocast does")
    parser.add_argument("--model", default="moving-digits", help="pipeline folder instead of the embedded model")
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights for --lora-pattern")
    parser.add_argument("--lora-pattern", action="append", help="pattern to measure with LoRA weights")
    parser.add_argument("--picture", type=cli.file_to_write, help="file for a sheet of frames under every pattern")
    parser.add_argument("--picture-labels", type=int, nargs="+", default=[3], help="digits on the sheet")
    parser.add_argument("--out", type=cli.file_to_write, help="file for the figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("measure_moving_digits"):
        measure(options)


if __name__ == "__main__":
    main()
