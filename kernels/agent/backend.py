"""The agent patterns' backend."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.dispatch import Backend
from visattn.kernels.agent.attention import agent_attention
from visattn.patterns import Agent
from visattn.problem import Call, OtherKind, Problem, Support


class AgentBackend(Backend):
    """Runs agent patterns, and nothing else; all others leave them to it."""

    name: ClassVar[str] = "agent"
    portable: ClassVar[bool] = True

    def available(self) -> Support:
        """Always: torch's own attention is all it needs."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Agent patterns without log-sum-exp."""
        if not isinstance(problem.pattern, Agent):
            return OtherKind(False, f"it runs agent patterns only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "two attentions in a row have no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """Every token meets every agent twice."""
        assert isinstance(problem.pattern, Agent)
        agents = problem.pattern.count(problem.layout.grid)
        return 2.0 * problem.batch * problem.heads * problem.layout.length * agents

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        assert isinstance(call.pattern, Agent)
        return agent_attention(q, k, v, call.pattern, call.layout, scale=call.scale, key_mask=call.key_mask), None


backend = AgentBackend()
