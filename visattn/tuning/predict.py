"""What is predicted of schedules: time and error of each layer in each stage, which add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from visattn.tuning.candidates import kind_of
from visattn.tuning.injections import Injections
from visattn.tuning.layers import Locals
from visattn.tuning.measure import Measurer
from visattn.tuning.solve import Choice
from visattn.tuning.subject import DENSE


def choices(
    measurer: Measurer,
    local: Locals,
    injections: Injections,
    overheads: Mapping[str, float],
    excess: Mapping[str, float],
) -> list[list[Choice]]:
    """Candidates of each layer and stage (layer by layer, stage by stage) with time and predicted loss.

    Args:
        measurer: Measures.
        local: What candidates do, by layer and stage.
        injections: What an error of a layer does to the output.
        overheads: Seconds of a call beyond those in `local`, by kind of pattern.
        excess: How many times more error than predicted, likewise.
    """
    found = []
    group_of = {layer: number for number, group in enumerate(measurer.groups) for layer in group}
    for layer, stage in itertools.product(range(measurer.subject.layers), range(measurer.plan.stages)):
        unit, here = (group_of[layer], stage), []
        for name, (error, seconds) in local[layer][stage].items():
            # A group's loss is shared by its layers as their errors are.
            whole = injections.error(unit, name)
            loss = 0.0 if name == DENSE or whole <= 0 else injections.loss(unit, name) * error / whole
            loss *= excess.get(kind_of(name), 1.0)
            if math.isfinite(loss):
                beyond = 0.0 if name == DENSE else overheads.get(kind_of(name), 0.0)
                here.append(Choice(name, (seconds + beyond) * measurer.calls[stage], loss))
        found.append(here)
    return found
