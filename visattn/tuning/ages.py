"""What attention that steps share errs and takes over a stage: by how old what is kept is in each of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from visattn.patterns import Residual, SharingPattern
from visattn.staged import with_precision
from visattn.tuning.subject import DENSE, Local


@lru_cache(maxsize=1024)
def sharing(name: str) -> SharingPattern | None:
    """The pattern of a candidate that shares between steps, None for others."""
    pattern, _ = with_precision(name)
    return pattern if isinstance(pattern, SharingPattern) else None


def growth(every: int, steps: int) -> float:
    """Mean squared age of what is kept, in so many steps of which the first refreshes.

    Outputs move evenly from step to step, to first order: the squared error of what is kept grows with the square of
    its age.
    """
    return sum((i % every) ** 2 for i in range(steps)) / steps


def of_stage(here: Mapping[str, Local], steps: int) -> dict[str, Local]:
    """What candidates do in a stage of so many steps, from means over all `every` steps of those that share.

    The first step of a stage refreshes: with few steps more of them do. In a stage of one step all would, so that those
    candidates are left out there.

    Args:
        here: What candidates of a layer do.
        steps: Of the stage.
    """
    found = {}
    for name, local in here.items():
        pattern = sharing(name)
        if pattern is None:
            found[name] = local
        elif steps > 1:
            every = pattern.every
            error = local.error * growth(every, steps) / growth(every, every)
            # What a refresh takes beyond a step that shares.
            dense = here[DENSE].seconds if DENSE in here else 0.0
            beyond = dense if isinstance(pattern, Residual) else every * local.seconds
            more = math.ceil(steps / every) / steps - 1 / every
            found[name] = Local(error, local.seconds + more * beyond if local.seconds else 0.0)
    return found
