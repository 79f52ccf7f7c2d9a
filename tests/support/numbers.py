"""A subject of tuning made of numbers: what candidates cost and how far off they are is given."""

import dataclasses
import math

import torch

from visattn.tuning.subject import DENSE, Local, Outcome

COSTS = {DENSE: (0.0, 10.0), "topk(keep=0.5)": (0.01, 6.0), "topk(keep=0.2)": (0.1, 3.0), "na(window=3x3)": (0.5, 1.0)}


class Numbers:
    """A model whose output's error is a weighted sum of its layers' errors, with noise of the seed."""

    measure = "psnr"
    device = torch.device("cuda")
    model, layers, parameters, steps, grid = "Numbers", 3, 17, 8, (16, 16)
    costs = COSTS
    # The first layer in the first steps matters most.
    weights = ((0.3, 0.02), (0.03, 0.002), (0.003, 0.0002))

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = [], stop_after

    def about(self):
        return {"model": self.model}

    def local(self, step, names, seeds, timed):
        self._count("local")
        return [{name: Local(*self.costs[name]) for name in names} for _ in range(self.layers)]

    def outcome(self, edges, assignment, seeds, timed=True):
        self._count("outcome")
        error = sum(
            self.weights[layer][stage] * self.costs[name][0]
            for layer, row in enumerate(assignment)
            for stage, name in enumerate(row)
        )
        seconds = sum(self.costs[name][1] for row in assignment for name in row)
        noise = [1 + 0.2 * ((seed * 7919) % 11) / 10 for seed in seeds]
        psnr = tuple(-10 * math.log10(error * n) if error else math.inf for n in noise)
        return Outcome(psnr, (0.9,) * len(psnr), (), seconds, seconds)

    def _count(self, what):
        self.calls.append(what)
        if self.stop_after is not None and len(self.calls) > self.stop_after:
            raise KeyboardInterrupt


class Late(Numbers):
    """The same where a call with `topk` costs more in a whole run than alone."""

    beyond = 8.0

    def outcome(self, edges, assignment, seeds, timed=True):
        found = super().outcome(edges, assignment, seeds, timed)
        late = sum(self.beyond for row in assignment for name in row if name.startswith("topk"))
        return dataclasses.replace(found, attention_seconds=found.attention_seconds + late)
