"""Whether a pattern has as many axes as the grid of a model, and what it would look like with as many."""

from __future__ import annotations

import dataclasses

from visattn.given import counted
from visattn.patterns import DynamicPattern, HybridPattern, Pattern, Radial
from visattn.patterns.values import axis_values, per_axis

# What keeps a parameter to one frame, where that is not 1.
ONE_FRAME = {"halo": 0, "causal": False, "circular": 0}


def check_dims(pattern: Pattern, dims: int, model: str) -> None:
    """Raise a ValueError that shows the right form if a pattern has another number of axes than a model's grid."""
    values = axis_values(pattern)
    given = {len(v) for v in values.values() if isinstance(v, tuple)}
    if isinstance(pattern, Radial) and dims == 2:
        raise ValueError(
            f"{pattern} needs the frames of a video, and the tokens of {model} are a (height, width) grid: use "
            "na(window=...) or clear(radius=...)"
        )
    if given <= {dims}:
        return
    grid = {1: "(tokens,)", 2: "(height, width)", 3: "(frames, height, width)"}[dims]
    message = (
        f"{pattern} has {counted(min(given - {dims}), 'axis', 'axes')} but the tokens of {model} are a {grid} grid"
    )
    if dims == 3 and given == {2}:
        each = {name: per_axis(v, 2, name) for name, v in values.items()}
        spatial = {name: (ONE_FRAME.get(name, 1), *v) for name, v in each.items()}
        # Lists of blocks are of all frames, and their blocks have no -1 for a whole axis.
        listed = isinstance(pattern, DynamicPattern | HybridPattern)
        whole = () if listed else ("window", "block")
        every = spatial | {name: (-1, *each[name]) for name in each if name in whole}
        forms = [f"{dataclasses.replace(pattern, **every)} (every frame)"] if every != spatial else []  # type: ignore[type-var]
        what = "blocks of one frame" if listed else "each frame alone"
        forms.append(f"{dataclasses.replace(pattern, **spatial)} ({what})")  # type: ignore[type-var]
        message += f": use {' or '.join(forms)}"
    elif dims == 2 and given == {3}:
        flat = {name: v[1:] if isinstance(v, tuple) else v for name, v in values.items()}
        message += f": use {dataclasses.replace(pattern, **flat)}"  # type: ignore[type-var]
    else:
        message += f": give {dims} values or 1" if dims > 1 else ": give 1 value"
    raise ValueError(message)
