"""A report as an image of ComfyUI: what was run, and what a query of it sees."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from visattn.canvas import GAP, Picture, column, text
from visattn.patterns import Agent, ListedPattern
from visattn.problem import Problem
from visattn.report import Report
from visattn.show import draw

# Patterns on grids that are drawn, those that ran most often, and characters of a line.
MOST, WIDEST = 3, 140


def picture(words: str, report: Report | None) -> torch.Tensor:
    """An image [1, height, width, 3] from 0 to 1.

    Args:
        words: The report as text, or what stands for one.
        report: The report, None where there is none.
    """
    lines = [line if len(line) <= WIDEST else line[: WIDEST - 3] + "..." for line in words.split("\n")]
    parts: list[Picture] = [text("\n".join(lines))]
    hits: Counter[Problem] = Counter()
    for site in () if report is None else report.sites:
        hits.update({call.problem: call.hits for call in site.calls})
    found = dict.fromkeys((problem.pattern, problem.layout) for problem, _ in hits.most_common())
    drawn = [pair for pair in found if isinstance(pair[0], ListedPattern | Agent)]
    parts += [draw(*pair) for pair in drawn[:MOST]]
    image = column(parts, margin=2 * GAP)
    return torch.from_numpy(np.asarray(image, np.float32) / 255)[None]
