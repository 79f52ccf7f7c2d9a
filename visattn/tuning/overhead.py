"""What a call costs in a whole run beyond its time alone, where the host has to keep ahead of the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from visattn.tuning.candidates import kind_of
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.subject import DENSE, Local


def overheads(measurer: Measurer, local: Sequence[Sequence[dict[str, Local]]]) -> dict[str, float]:
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
    plan = measurer.plan
    edges = [round(edge * measurer.subject.steps) for edge in plan.edges]
    calls = [end - first for first, end in itertools.pairwise(edges)]
    names = [name for name in plan.candidates if all(name in each for layer in local for each in layer)]
    times = {
        name: sum(n * each[name].seconds for layer in local for n, each in zip(calls, layer, strict=True))
        for name in names
    }
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: times[name]):
        if name != DENSE and times[name] < times.get(DENSE, 0.0):
            kinds.setdefault(kind_of(name), []).append(name)
    try:
        # Dense attention says what a second of a layer is in these figures, which are of one sample.
        dense = _measured(measurer, DENSE) if kinds else 0.0
        if dense <= 0:
            return {}
        middle = {kind: some[len(some) // 2] for kind, some in kinds.items()}
        beyond = {}
        for done, (kind, name) in enumerate(middle.items()):
            measurer.tell("candidates in whole runs", done, len(middle))
            beyond[kind] = _measured(measurer, name) * times[DENSE] / dense - times[name]
        measurer.tell("candidates in whole runs", len(middle), len(middle))
    except OutOfTime:
        return {}
    return {kind: max(seconds, 0.0) / (sum(calls) * len(local)) for kind, seconds in beyond.items()}


def _measured(measurer: Measurer, name: str) -> float:
    """Time of a sample in attention with a pattern everywhere."""
    row = (name,) * measurer.plan.stages
    return measurer.outcome((row,) * measurer.subject.layers, measurer.plan.samples).attention_seconds
