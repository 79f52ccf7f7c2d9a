"""What whole runs with one candidate say beyond what is predicted of its calls: time, and error."""

from __future__ import annotations

from visattn.tuning.candidates import kind_of
from visattn.tuning.injections import Injections
from visattn.tuning.layers import Locals
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.subject import DENSE, everywhere

# Squared error from which a sample is another one.
LOST = 0.01


def overheads(measurer: Measurer, local: Locals) -> dict[str, float]:
    """Seconds of a call in a whole run beyond those in a layer, by kind of pattern.

    One candidate of each kind, of middle time, runs at all layers and stages and is compared with dense attention.
    Patterns that choose blocks launch many small kernels, for which a GPU waits if the model's own calls are short.

    Args:
        measurer: Measures.
        local: What candidates do, by layer and stage.

    Returns:
        Seconds by the name of a kind such as "topk"; empty where the time is over, nothing is timed, or the device is
        the host.
    """
    if measurer.subject.device.type == "cpu":
        return {}
    times, chosen = middle(measurer, local)
    try:
        # Dense attention says what a second of a layer is in these figures, which are of one sample.
        dense = _measured(measurer, DENSE) if chosen else 0.0
        if dense <= 0:
            return {}
        beyond = {}
        for done, (kind, name) in enumerate(chosen.items()):
            measurer.tell("candidates in whole runs", done, len(chosen))
            beyond[kind] = _measured(measurer, name) * times[DENSE] / dense - times[name]
        measurer.tell("candidates in whole runs", len(chosen), len(chosen))
    except OutOfTime:
        return {}
    return {kind: max(seconds, 0.0) / (sum(measurer.calls) * len(local)) for kind, seconds in beyond.items()}


def excess(measurer: Measurer, local: Locals, injections: Injections) -> dict[str, float]:
    """How many times more error than predicted a kind of pattern makes in a whole run, beside the kind that has least.

    Lists that are kept, for one, are measured at one age, and how they fare at others depends on who chose them.

    Args:
        measurer: Measures.
        local: What candidates do, by layer and stage.
        injections: What an error of a layer does to the output.

    Returns:
        Factors from 1 by the name of a kind; empty where the time is over.
    """
    _, chosen = middle(measurer, local)
    found = {}
    try:
        for kind, name in chosen.items():
            predicted = sum(injections.loss(unit, name) for unit in injections.responses)
            if predicted > 0:
                seen = measurer.quality(everywhere(name, measurer.subject.layers, measurer.plan.stages)).error
                # A sample that is another one altogether says nothing of how much more error that took.
                found[kind] = min(seen, LOST) / min(predicted, LOST)
    except OutOfTime:
        return {}
    least = min(found.values(), default=1.0)
    return {kind: ratio / least for kind, ratio in found.items()}


def middle(measurer: Measurer, local: Locals) -> tuple[dict[str, float], dict[str, str]]:
    """Time of candidates in all layers of a run, and of each kind that one of middle time that is faster than dense."""
    names = [name for name in measurer.plan.candidates if all(name in each for layer in local for each in layer)]
    times = {
        name: sum(n * each[name].seconds for layer in local for n, each in zip(measurer.calls, layer, strict=True))
        for name in names
    }
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: times[name]):
        if name != DENSE and times[name] < times.get(DENSE, 0.0):
            kinds.setdefault(kind_of(name), []).append(name)
    return times, {kind: some[len(some) // 2] for kind, some in kinds.items()}


def _measured(measurer: Measurer, name: str) -> float:
    """Time of a sample in attention with a pattern everywhere."""
    row = everywhere(name, measurer.subject.layers, measurer.plan.stages)
    return measurer.outcome(row, measurer.plan.samples).attention_seconds
