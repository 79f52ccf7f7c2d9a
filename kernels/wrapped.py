"""Gates and temperatures: factors per token and head around the attention of another pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, choose, overhead
from visattn.operands import repeated, widened
from visattn.patterns import Gated, Selective, Wrapped
from visattn.prepare import run_call
from visattn.problem import PRECISIONS, Call, OtherKind, Problem, Support


class WrappedBackend(Backend):
    """Runs gated and selective patterns, by the backends that run the pattern inside."""

    name: ClassVar[str] = "wrapped"
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Wrapped patterns whose pattern inside has a backend."""
        if not isinstance(problem.pattern, Wrapped):
            return OtherKind(False, f"it runs gated and selective patterns only, not {problem.pattern.name}")
        try:
            choose(_inside(problem))
        except ValueError as error:
            return Support(False, str(error))
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """That of the pattern inside, and passes over queries, values or outputs."""
        own = _inside(problem)
        return choose(own).cost(own) + overhead(problem, 0.2, 60)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`; the log-sum-exp is that of the pattern inside."""
        pattern = call.pattern
        assert isinstance(pattern, Wrapped)
        own = replace(call, pattern=pattern.of, parameters=pattern.inner_parameters(call.parameters))
        if isinstance(pattern, Gated):
            out, lse = run_call(q, k, v, own)
            return (widened(out) * gates(q, pattern, call.parameters)).to(out.dtype), lse
        assert isinstance(pattern, Selective)
        keys = k.shape[1] if call.key_mask is None else call.key_mask.sum(1)
        scaled = (widened(q) * query_factors(q, keys, call.parameters)).to(q.dtype)
        if pattern.values and ("value_weight" in call.parameters or "value_bias" in call.parameters):
            k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
            v = (widened(v) * token_factors(v, call.parameters, "value")).to(v.dtype)
        return run_call(scaled, k, v, own)


def _inside(problem: Problem) -> Problem:
    assert isinstance(problem.pattern, Wrapped)
    return replace(problem, pattern=problem.pattern.of)


def _linear(x: torch.Tensor, parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The numbers w . x + b of each head: [B, S, H, D] -> [B, S, H], float32 at least; missing parameters are 0."""
    wide = widened(x)
    weight, bias = parameters.get(f"{name}_weight"), parameters.get(f"{name}_bias")
    found = wide.new_zeros(wide.shape[:-1])
    if weight is not None:
        found = found + torch.einsum("bshd,hd->bsh", wide, weight.to(wide.dtype))
    return found if bias is None else found + bias.to(wide.dtype)


def gates(q: torch.Tensor, pattern: Gated, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The factors of `Gated` on outputs: [B, S, H, 1] of queries [B, S, H, D]."""
    opened = (_linear(q, parameters, "gate") + pattern.level).sigmoid()
    return (opened / pattern.init if pattern.rescale else opened)[..., None]


def token_factors(x: torch.Tensor, parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """1 + tanh(w . x + b): [B, S, H, 1]."""
    return 1 + _linear(x, parameters, name).tanh()[..., None]


def query_factors(q: torch.Tensor, keys: int | torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The factors of `Selective` on queries: [B, S, H, 1].

    Args:
        q: Queries [B, S, H, D].
        keys: How many keys are valid, or of each sample: [B].
        parameters: By name.
    """
    found = token_factors(q, parameters, "query")
    length = parameters.get("query_length")
    if length is None:
        return found
    number = torch.as_tensor(keys, device=q.device, dtype=found.dtype).clamp(min=1).log()
    return found + number.reshape(-1, 1, 1, 1) * length.to(found.dtype)[:, None]


backend = WrappedBackend()
