"""A test bed of the search: a model of numbers with what makes real ones hard, whose optimum can be computed.

Sensitivities differ by layer, stage, prompt and seed; candidates fare differently by layer; measured times have noise;
an error in the first stage turns some samples into others. Figures are like those of `emoji` with 128x128 tokens in
`docs/results`: the time and the error of `topk`, how samples spread, how often they turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch

from visattn.tuning.solve import Choice, ladder
from visattn.tuning.subject import DENSE, Local, Outcome

KEPT = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
WINDOWS = (5, 9, 11, 13)
TOPK = {f"topk(keep={k}, rest=mean)": (0.085 + 0.9 * k, 0.04 * 10 ** (-2.3 * k)) for k in KEPT}
NA = {f"na(window={w}x{w})": (0.02 + (w / 16) ** 2, 0.2 * (1 - (w / 16) ** 2) ** 2) for w in WINDOWS}
# Share of the run in which errors turn samples into others.
EARLY = 0.25
# Seconds of a call and squared error of a layer's output, before what differs by layer.
COSTS = {DENSE: (1.0, 0.0)} | TOPK | NA


@dataclasses.dataclass(frozen=True)
class Hard:
    """What makes a bed hard.

    Attributes:
        clock: Relative noise of a measured time.
        misfit: How far (log) a candidate is from what its local error says.
        spread: How far (log) the sensitivity of a layer and stage differs between prompts, and between seeds.
        turning: Error of the first quarter at which half of the samples turn into others; 0 if none does.
        together: Share of errors that add up in amplitude, not in square.
        floor: Error of whatever is not dense everywhere.
    """

    clock: float = 0.03
    misfit: float = 0.15
    spread: float = 0.5
    turning: float = 6e-4
    together: float = 0.02
    floor: float = 3e-5


class Bed:
    """See `visattn.tuning.subject.Subject`."""

    measure = "psnr"
    model, parameters, grid = "Bed", 17, (16, 16)

    def __init__(self, number: int, hard: Hard = Hard(), layers: int = 11, steps: int = 12, prompts: int = 5) -> None:
        self.number, self.hard, self.layers, self.steps, self.prompts = number, hard, layers, steps, prompts
        self.device = torch.device("cpu")
        rng = np.random.default_rng(number)
        self.names, n = tuple(COSTS), len(COSTS)
        # How well windows and blocks do in a layer, and how much each step of it matters.
        window = np.array([name.startswith("na") for name in self.names])
        fares = np.where(window, rng.lognormal(0, 1.2, (layers, 1)), rng.lognormal(0, 0.6, (layers, 1)))
        self._local = fares * np.array([COSTS[name][1] for name in self.names])
        self._seconds = np.array([COSTS[name][0] for name in self.names]) * rng.lognormal(0, 0.02, (layers, n))
        self._misfit = rng.lognormal(0, hard.misfit, (layers, steps, n))
        layer = rng.lognormal(0, 0.7, layers)
        self._matters = layer[:, None] * 10 ** (-1.3 * (np.arange(steps) + 0.5) / steps) * 8e-3 * 12 / steps
        self._of_prompt = rng.lognormal(0, hard.spread, (prompts, layers, 1)) * rng.lognormal(0, 0.35, (prompts, 1, 1))
        # One of the prompts is 4 to 6 dB worse.
        self._of_prompt[0] *= 10 ** rng.uniform(0.4, 0.6)
        # Whole runs whose time was taken.
        self.runs = 0

    def about(self):
        return {"model": self.model, "bed": self.number}

    def _of_seed(self, seed: int) -> tuple[np.ndarray, float, float]:
        """How much steps of layers matter to a sample, the error at which it turns, and the error when it has."""
        rng = np.random.default_rng((self.number, 7, seed))
        factor = self._of_prompt[seed % self.prompts] * rng.lognormal(0, self.hard.spread / 2, (self.layers, 1))
        matters = self._matters * factor * rng.lognormal(0, 0.4)
        return matters, self.hard.turning * rng.lognormal(0, 2.0), 10 ** rng.uniform(-2.6, -1.6)

    def _edges(self, edges) -> list[int]:
        return [round(edge * self.steps) for edge in edges]

    def tables(self, edges, seeds) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Errors [sample, layer, stage, candidate], early stages, where samples turn, and errors when they have."""
        drawn = [self._of_seed(seed) for seed in seeds]
        steps = np.stack([matters for matters, _, _ in drawn])[..., None] * (self._local[:, None] * self._misfit)
        at = self._edges(edges)
        found = np.stack([steps[:, :, a:b].sum(2) for a, b in itertools.pairwise(at)], axis=2)
        early = np.array([stage * self.steps < EARLY * self.steps for stage in edges[:-1]])
        return found, early, np.array([t for _, t, _ in drawn]), np.array([e for _, _, e in drawn])

    def times(self, edges) -> np.ndarray:
        """True seconds [layer, stage, candidate] of a sample."""
        return self._seconds[:, None] * np.diff(self._edges(edges))[:, None]

    def indices(self, assignment) -> np.ndarray:
        return np.array([[self.names.index(name) for name in row] for row in assignment])

    def errors(self, tables, chosen: np.ndarray) -> np.ndarray:
        """True error of each sample [sample]."""
        table, early, turns, turned = tables
        here = np.take_along_axis(table, chosen[None, :, :, None], 3)[..., 0]
        flat, share = here.reshape(len(here), -1), self.hard.together
        total = (1 - share) * flat.sum(1) + share * np.sqrt(flat).sum(1) ** 2
        if self.hard.turning:
            total = total + turned * (here[:, :, early].sum((1, 2)) > turns)
        return np.minimum(total + self.hard.floor * (chosen > 0).any(), 0.1)

    def local(self, step, names, seeds, timed):
        rng = np.random.default_rng((self.number, 11, step))
        noise = rng.lognormal(0, self.hard.clock, (self.layers, len(self.names)))
        return [
            {
                name: Local(
                    float(self._local[layer, i]),
                    float(self._seconds[layer, i] * noise[layer, i]) if name in timed else 0.0,
                )
                for name in names
                for i in [self.names.index(name)]
            }
            for layer in range(self.layers)
        ]

    def outcome(self, edges, assignment, seeds, timed=True):
        chosen = self.indices(assignment)
        if timed:
            self.runs += 1
        errors = self.errors(self.tables(edges, seeds), chosen)
        psnr = tuple(-10 * math.log10(error) if error > 0 else math.inf for error in errors)
        rng = np.random.default_rng((self.number, 13, self.runs))
        seconds = self.true_seconds(edges, assignment) * rng.lognormal(0, self.hard.clock)
        return Outcome(psnr, (), (), seconds, seconds)

    def true_seconds(self, edges, assignment) -> float:
        return float(np.take_along_axis(self.times(edges), self.indices(assignment)[..., None], 2).sum())


def held(errors: np.ndarray, share: float) -> float:
    """The PSNR that so large a share of samples has."""
    ranked = np.sort(-10 * np.log10(np.maximum(errors, 1e-12)))
    return float(ranked[min(int((1 - share) * len(ranked) + 1e-9), len(ranked) - 1)])


def best_uniform(bed: Bed, edges, seeds, bound: float, share: float = 0.95) -> float:
    """True seconds of the fastest single pattern that holds, with any first stages dense; dense where none does."""
    tables, times, stages = bed.tables(edges, seeds), bed.times(edges), len(edges) - 1
    best = float(times[..., 0].sum())
    for first in range(stages):
        for i in range(1, len(bed.names)):
            chosen = np.full((bed.layers, stages), i)
            chosen[:, :first] = 0
            if held(bed.errors(tables, chosen), share) >= bound:
                best = min(best, float(np.take_along_axis(times, chosen[..., None], 2).sum()))
    return best


def optimum(bed: Bed, edges, seeds, bound: float, share: float = 0.95, rounds: int = 60) -> tuple[float, np.ndarray]:
    """True seconds and choices of a schedule that stands for the optimum: it holds, and none faster was found.

    Nothing is predicted: tables are the true ones. Weights of the samples (those near the bound weigh more in each
    round) give a ladder each; the best of the first rungs that hold is made faster unit by unit as long as it holds.
    """
    tables, times, stages = bed.tables(edges, seeds), bed.times(edges), len(edges) - 1
    table, limit = tables[0], 10 ** (-bound / 10)
    best, found = float(times[..., 0].sum()), np.zeros((bed.layers, stages), int)
    for dense in range(stages):
        weights = np.ones(len(table)) / len(table)
        seen_best, seen_found = math.inf, found
        for _ in range(rounds):
            loss = np.tensordot(weights, table, 1)
            units = [
                [Choice(str(i), times[k, s, i], loss[k, s, i]) for i in range(len(bed.names)) if s >= dense or i == 0]
                for k in range(bed.layers)
                for s in range(stages)
            ]
            rungs = ladder(units)
            low, high = 0, len(rungs) - 1
            while low < high:
                middle = (low + high) // 2
                chosen = _chosen(rungs[middle], bed, stages)
                low, high = (low, middle) if held(bed.errors(tables, chosen), share) >= bound else (middle + 1, high)
            chosen = _chosen(rungs[high], bed, stages)
            if rungs[high].time < seen_best:
                seen_best, seen_found = rungs[high].time, chosen
            errors = bed.errors(tables, chosen)
            # Those that may miss the bound do not count.
            counted = errors <= np.sort(errors)[-1 - int((1 - share) * len(errors) + 1e-9)]
            weights = weights * np.exp(1.0 * np.minimum(errors / limit, 1.5)) * np.where(counted, 1, 0.2)
            weights /= weights.sum()
        seen_best, seen_found = exchanged(bed, tables, times, seen_found, bound, share)
        if seen_best < best:
            best, found = seen_best, seen_found
    return best, found


def exchanged(bed, tables, times, chosen, bound, share):
    """A schedule that holds made faster: a unit after the other gets a faster candidate, as long as it holds."""
    units = [(k, s) for k in range(chosen.shape[0]) for s in range(chosen.shape[1])]
    now = float(np.take_along_axis(times, chosen[..., None], 2).sum())
    better = True
    while better:
        better = False
        for k, s in units:
            for i in range(len(bed.names)):
                gain = times[k, s, chosen[k, s]] - times[k, s, i]
                if gain <= 1e-9:
                    continue
                one = chosen.copy()
                one[k, s] = i
                if held(bed.errors(tables, one), share) >= bound:
                    chosen, now, better = one, now - gain, True
    return now, chosen


def _chosen(rung, bed, stages) -> np.ndarray:
    return np.array([int(name) for name in rung.names]).reshape(bed.layers, stages)
