"""Shares attention between denoising steps: the output, or what another pattern leaves of it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch

from visattn.checks import check_steps
from visattn.dispatch import Backend, choose, load, overhead
from visattn.kernels.heard import grid_share, hearing
from visattn.patterns import Dense, Residual, SharingPattern
from visattn.patterns.choice.listening import hears, tell_shares, tell_sharing
from visattn.patterns.choice.memory import beside
from visattn.patterns.choice.outputs import KeptOutput, Slot, pooled
from visattn.prepare import run_like
from visattn.problem import PRECISIONS, Call, OtherKind, Problem, Support

# Passes over outputs, in products of a token with so many keys: memory-bound.
PASS = {"cpu": 12.0, "cuda": 50.0}
DENSE = Dense()
Result = tuple[torch.Tensor, torch.Tensor | None]
# Output, what is told of its density, and bytes that are kept.
Computed = tuple[torch.Tensor, torch.Tensor | None, int]


class SharingBackend(Backend):
    """Runs residual and broadcast, by the backends that run the pattern inside and dense attention."""

    name: ClassVar[str] = "sharing"
    # Of the pattern inside, whose backend is asked in turn.
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Patterns that share between steps, without log-sum-exp; the pattern inside must have a backend."""
        pattern = problem.pattern
        if not isinstance(pattern, SharingPattern):
            return OtherKind(False, f"it runs residual and broadcast only, not {pattern.name}")
        if problem.lse:
            return Support(False, "what an earlier step kept has no log-sum-exp")
        try:
            choose(_inside(problem, pattern))
        except ValueError as error:
            return Support(False, str(error))
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The mean over refreshes and the steps that share; with gradients all calls refresh."""
        pattern = problem.pattern
        assert isinstance(pattern, SharingPattern)
        own, dense = _inside(problem, pattern), replace(problem, pattern=DENSE, precision=None)
        of, whole = choose(own).cost(own), load("sdpa").cost(dense)
        if problem.grad:
            return whole if isinstance(pattern, Residual) else of
        rows = float(problem.batch * problem.heads * problem.layout.length)
        looks = not math.isinf(pattern.drift)
        passes = (1.5 if isinstance(pattern, Residual) else 1.0) + looks
        moved = rows * passes * PASS.get(problem.device, PASS["cuda"])
        # Looking pools, compares and waits.
        return pattern.mean(of, whole) + moved + overhead(problem, 0.1 + 0.2 * looks, 20 + 100 * looks)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Result:
        """See `Backend.run`; there is no log-sum-exp."""
        pattern = call.pattern
        assert isinstance(pattern, SharingPattern)
        # A call that was prepared in a run may be made outside of one.
        check_steps(pattern)
        slot = _slot(q, k, v, call, pattern)
        kept = None if slot is None else slot.find()
        if slot is None or kept is None:
            out, density, nbytes = _refresh(q, k, v, call, pattern, slot)
        else:
            out, density, nbytes = _share(q, k, v, call, pattern, slot, kept)
        tell_sharing(kept is None, nbytes)
        if density is not None:
            # Listeners add the pairs with dense tokens, which are computed as often as others.
            tell_shares(density)
        return out, None


def _inside(problem: Problem, pattern: SharingPattern) -> Problem:
    return replace(problem, pattern=pattern.running)


def _slot(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, pattern: SharingPattern) -> Slot | None:
    """Where a call keeps its output for later steps, None if it may not."""
    own = (
        pattern, call.layout, q.shape, k.shape, v.shape, q.dtype, q.device, call.scale, call.key_mask is None,
        call.precision,
    )  # fmt: skip

    return Slot.of(pattern.every, pattern.drift, own, (q, k, v), lambda: pooled(q, k, v, call.key_mask))


def _refresh(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, pattern: SharingPattern, slot: Slot | None
) -> Computed:
    """Compute anew, and keep what a later step may take."""
    keeps = slot is not None and slot.serves
    if slot is not None:
        # Before the new one is there: never two of them.
        slot.let_go()
    if not isinstance(pattern, Residual):
        out, told = _of(q, k, v, call, pattern, None)
        # Whoever gets an output may write to it.
        return out, told, slot.keep(out.clone()) if slot is not None and keeps else 0
    out, _ = run_like(q, k, v, replace(call, pattern=DENSE, precision=None, parameters={}), "auto")
    if slot is None or not keeps:
        return out, _told(1.0, q, call), 0
    own, told = _of(q, k, v, call, pattern, slot.memory.step)
    layout = call.layout
    return out, None if told is None else told + layout.length**2 / layout.tokens**2, slot.keep(out - own)


def _share(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    pattern: SharingPattern,
    slot: Slot,
    kept: KeptOutput,
) -> Computed:
    """Take what an earlier step kept."""
    if isinstance(pattern, Residual):
        own, told = _of(q, k, v, call, pattern, kept.step)
        out = own + kept.value
    else:
        out, told = kept.value.clone(), _told(0.0, q, call)
    if slot.memory.step >= kept.until:
        slot.let_go()
    return out, told, kept.nbytes


def _of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, pattern: SharingPattern, refreshed: int | None
) -> Result:
    """The output of the pattern inside, and what it lists.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        call: The call.
        pattern: Its pattern.
        refreshed: The step whose lists hold, None where no later step needs these.
    """
    running = pattern.of if refreshed is None else pattern.running
    # What is chosen belongs to one refresh; what other patterns keep goes on from step to step.
    chosen = nullcontext() if running is pattern.of else beside(("of", refreshed))
    with chosen, hearing(running, call.layout, q) as heard:
        out, _ = run_like(q, k, v, replace(call, pattern=running), "auto")
    return out, heard() if hears() else None


def _told(density: float, q: torch.Tensor, call: Call) -> torch.Tensor | None:
    """A density as the share that listeners are told; None if nobody listens."""
    if not hears():
        return None
    share = grid_share(density, call.layout)
    return torch.full((q.shape[0], q.shape[2]), share, dtype=torch.float64, device=q.device)


backend = SharingBackend()
