"""Measures what attention patterns cost the animoji video model: are its clips still what was asked for, how fast?

    python -m scripts.measure.animoji --data out/animoji-data --device cuda --pictures out/animoji-quality

As scripts.measure.emoji measures pictures, and with the same judge, which was trained on single real pictures: each
pattern draws the same captions, seen and unseen, from the same noise; a clip is named by the mean of its frames. The
Frechet distances to real clips are that of frames and that of pictures of the differences between successive frames.
"movement" is the mean change of a value from frame to frame, "flicker" its distance from the middle of the frames
before and after; "real" has the same figures of real clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts import cli
from scripts.measure.animoji_judge import ClipJudge
from scripts.measure.draftsman import DENSE, Draftsman, Drawn
from scripts.measure.emoji import add_options, measure, report
from scripts.train.animoji_data import SIDE, load_pack
from visattn.canvas import column, row

# Patterns that a video model of Wan's kind takes, at 16x16x16 tokens.
PATTERNS = (
    DENSE,
    "na(window=8x8x8,stride=4x4x4)",
    "na(window=9x9x9)",
    "na(window=16x8x8,stride=16x4x4)",
    "halo(block=4x4x4,halo=2)",
    "clear(radius=5)",
    "clear(radius=5,pool=4)",
    "radial(decay=0.5)",
    "routing(regions=4x4x4,topk=8)",
    "agent(agents=4x4x4)",
    "linear(feature=elu)",
    "flow",
)
SHOWN = 4


class ClipDraftsman(Draftsman):
    """A draftsman of clips."""

    def batch(self, size: int) -> int:
        """See `Draftsman.batch`."""
        return max(1, SIDE * SIDE * self.options.batch // size**2)

    def shape(self, size: int) -> tuple[int, ...]:
        """See `Draftsman.shape`."""
        return (3, self.pipe.config.num_frames, size, size)

    def sheet(self, drawn: Drawn) -> Image.Image:
        """The first clips of each kind, a row each."""
        clips = [clip for some in drawn.pictures.values() for clip in some[:SHOWN]]
        return column([row([_picture(frame) for frame in clip]) for clip in clips], gap=2)


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def judge_of(encoder: Any, options: argparse.Namespace) -> ClipJudge:
    """The judge of clips."""
    return ClipJudge.of(encoder, load_pack(options.data, options.device), options.captions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(
        patterns=list(PATTERNS),
        sizes=[SIDE],
        model="animoji",
        data=Path("out/animoji-data"),
        out=Path("docs/results/animoji-quality.json"),
    )
    options = parser.parse_args(arguments)
    with cli.told("measure_animoji"), cli.only_writer(options.out):
        report(measure(options, judge_of, ClipDraftsman))


if __name__ == "__main__":
    main()
