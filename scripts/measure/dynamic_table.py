"""Measures dynamic patterns against static ones at equal densities, on pictures or clips of the embedded models.

    python -m scripts.measure.dynamic_table pictures --data out/emoji-data --device cuda
    python -m scripts.measure.dynamic_table clips --data out/animoji-data --device cuda

Rows are those of scripts.measure.emoji and scripts.measure.animoji: the same captions from the same noise, named by the
same judge. Patterns whose density no parameter sets (a share of attention, deviations, a radius) are run on a few
captions first, and the parameter is halved in until the density is the one asked for; what was found is in the
results, for the next start. With --dense-steps the first steps of each run are dense, as published figures have them.
Stop it at any time, or with --seconds: rows that are in --out are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import cli
from scripts.measure import animoji, emoji
from scripts.measure.draftsman import DENSE, Draftsman, Student, patched
from scripts.measure.emoji import add_options, measure, report, write
from scripts.train.animoji_data import SIDE as CLIP_SIDE
from visattn import parse
from visattn.patterns.kinds import StaticPattern

DENSITIES = (0.2, 0.1, 0.3)
# Relative distances from a density at which the search ends, and beyond which a pattern is left out.
TRIED_STEPS, HALVINGS, CLOSE, FAR = 6, 7, 0.02, 0.15
SQUARES = {0.1: (20, 7), 0.2: (29, 13), 0.3: (35, 19)}
# Blocks of as many queries as by default, and of a quarter and an eighth of the keys.
FINE = {
    "pictures": ("block=8x8,key_block=4x4", "block=8x8,key_block=2x4"),
    "clips": ("block=4x4x4,key_block=2x2x4", "block=4x4x4,key_block=2x2x2"),
}
# A box, a tube along time, and a slab of (nearly) whole frames.
WINDOWS = {
    0.1: ("7x7x8", "16x5x5", "2x14x14"),
    0.2: ("9x9x10", "16x7x7", "3x16x16"),
    0.3: ("11x11x10", "16x9x9", "5x16x16"),
}


@dataclass(frozen=True)
class Family:
    """Patterns of one number that the density grows or falls with.

    Attributes:
        text: The pattern, with {} where the number goes.
        least: Number of the sparsest one.
        most: Number of the densest one.
        whole: Whether the number is whole.
    """

    text: str
    least: float
    most: float
    whole: bool = False

    def at(self, number: float) -> str:
        """The pattern of a number."""
        return self.text.format(round(number) if self.whole else f"{number:.4g}")

    def of_density(self, density: float, reached: Callable[[str], float]) -> str:
        """The pattern whose density, which `reached` measures, is nearest to one; found by halving.

        Raises:
            ValueError: If the densities of its numbers are all far from it.
        """
        low, high, best = self.least, self.most, (2.0, "")
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = reached(self.at(middle))
            best = min(best, (abs(found - density), self.at(middle)))
            low, high = (middle, high) if found < density else (low, middle)
            if best[0] < CLOSE * density:
                break
        if best[0] > FAR * density:
            raise ValueError(f"the density of {best[1]} is {best[0]:.3f} off {density:g}, and none is nearer")
        return best[1]


def rows_of(kind: str, density: float) -> list[str | Family]:
    """What is compared at a density; what takes longest comes last, for runs of limited time."""
    keep = f"keep={density:g}"
    found: list[str | Family] = [f"topk({keep})", f"topk({keep},rest=mean)", f"topk({keep},rest=slope)"]
    found += [f"topk({keep},rest=slope,{blocks})" for blocks in FINE[kind]]
    if kind == "pictures":
        side, far = SQUARES[density]
        square = f"na(window={side}x{side})"
        found += [square, Family("clear(radius={})", 4, 40, whole=True)]
        best = f"best(of=[{square},na(window=-1x{far}),na(window={far}x-1)])"
    else:
        windows = [f"na(window={window})" for window in WINDOWS[density]]
        found += [*windows, Family("clear(radius={})", 2, 14, whole=True)]
        # The first frame and the nearest ones whole are 28 % of 16 frames at least.
        found += [Family("radial(decay={},block=8)", 0.02, 4.0)] * (density > 0.25)
        # Sparse VideoGen's two forms: near frames, and near places in all frames.
        best = f"best(of=[{windows[2]},{windows[1]}])"
    return [
        *found,
        Family("above(tau={},rest=mean)", 3.0, -1.0),
        Family("above(tau={})", 3.0, -1.0),
        Family("topp(p={})", 0.01, 0.99),
        best,
        Family("kmeans(queries=64,keys=128,p={},floor=0.0,start=20)", 0.01, 0.99),
    ]


class Tuner:
    """Finds patterns of a density on a few captions, and remembers them in the results.

    Args:
        draftsman: Draws.
        figures: The results.
        size: Side in pixels.
        keep: Writes the results: each search takes long.
    """

    def __init__(self, draftsman: Draftsman, figures: dict[str, Any], size: int, keep: Callable[[], None]) -> None:
        self._draftsman, self._size, self._keep = draftsman, size, keep
        self._known: dict[str, str] = figures.setdefault("tuned", {})

    def pattern(self, row: str | Family, density: float) -> str:
        """A row's pattern, as text."""
        if isinstance(row, str):
            return row
        key = f"{row.text} at {density:g}"
        if key not in self._known:
            self._known[key] = row.of_density(density, self._reached)
            self._keep()
        return self._known[key]

    def _reached(self, text: str) -> float:
        drawn_by, options = self._draftsman, self._draftsman.options
        captions = drawn_by.judge.captions("seen")[:2]
        # What the grid alone decides is the same at each step.
        steps = 1 if isinstance(parse(text), StaticPattern) else TRIED_STEPS
        with patched(drawn_by.pipe, Student(text), options.backend) as handle:
            drawn_by.call(captions, options.seed, self._size, steps)
            density = handle.report().density
        print(f"{text}: density {density:.3f}", flush=True)
        return density


def students(kind: str, densities: Sequence[float], tuner: Tuner, dense_steps: int) -> list[Student]:
    """Every row of the table, by density."""
    found = [Student(DENSE)]
    for density in densities:
        for row in rows_of(kind, density):
            try:
                pattern = tuner.pattern(row, density)
            except Exception as error:
                # Kernels may fail to compile in ways of their own; the other patterns are worth measuring.
                print(f"{row}: {type(error).__name__}: {error}", flush=True)
                continue
            found.append(Student(pattern, dense_steps=dense_steps))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, side, model in (("pictures", 256, "emoji"), ("clips", CLIP_SIDE, "animoji")):
        some = kinds.add_parser(kind)
        add_options(some)
        some.add_argument("--densities", nargs="+", type=cli.number, default=list(DENSITIES), choices=DENSITIES)
        out = Path(f"docs/results/{model}-dynamic.json")
        some.set_defaults(sizes=[side], model=model, data=Path(f"out/{model}-data"), out=out, patterns=[])
    options = parser.parse_args(arguments)
    module, drawn_by = (emoji, Draftsman) if options.kind == "pictures" else (animoji, animoji.ClipDraftsman)
    start = time.monotonic()

    def chosen(draftsman: Draftsman, figures: dict[str, Any]) -> list[Student]:
        tuner = Tuner(draftsman, figures, options.sizes[0], lambda: write(figures, options.out))
        found = students(options.kind, options.densities, tuner, options.dense_steps)
        print(f"patterns known after {time.monotonic() - start:.0f} s", flush=True)
        return found

    with cli.told("dynamic_table"), cli.only_writer(options.out):
        report(measure(options, module.judge_of, drawn_by, chosen))


if __name__ == "__main__":
    main()
