"""Runs gates: trained weights choose the lists, and whoever runs lists runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, choose, overhead
from visattn.kernels.choosing import on_every_token
from visattn.patterns import Gate
from visattn.patterns.choice.listening import choosing
from visattn.patterns.tailed import holding
from visattn.prepare import run_like
from visattn.problem import PRECISIONS, Call, OtherKind, Problem, Support

# Pairs of dense attention that pools cost a CPU for each token and head.
TOKEN = 250.0


class GateBackend(Backend):
    """Runs gates, by the backends that run the pattern that picks."""

    name: ClassVar[str] = "gate"
    # Of the backend that runs the lists, which is asked in turn.
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Gates."""
        if not isinstance(problem.pattern, Gate):
            return OtherKind(False, f"it runs lists that trained weights choose, not {problem.pattern.name}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """That of the pattern that picks."""
        assert isinstance(problem.pattern, Gate)
        own = replace(problem, pattern=problem.pattern.by)
        return choose(own).cost(own) + on_every_token(problem, TOKEN) + overhead(problem, 0.5, 100)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern = call.pattern
        assert isinstance(pattern, Gate)
        with choosing():
            choice = pattern.choose(q, k, call.layout, call.key_mask, call.parameters)
        with holding(pattern.by, choice):
            return run_like(q, k, v, replace(call, pattern=pattern.by, parameters={}), "auto")


backend = GateBackend()
