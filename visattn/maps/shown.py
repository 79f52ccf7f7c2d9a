"""What a page of maps shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from numpy.typing import NDArray

from visattn.canvas import Picture
from visattn.maps import heat
from visattn.maps.overview import Overview


@dataclass(frozen=True)
class Details:
    """Maps of the heads of one module.

    Attributes:
        dense: Row of the chosen query on the grid, a plane a head.
        sparse: The same under a pattern; () without one.
        read: Which tokens of the grid all its queries read together, likewise.
        offsets: Histogram of offsets, a plane a head; () where they were left out.
    """

    dense: Sequence[NDArray] = ()
    sparse: Sequence[NDArray] = ()
    read: Sequence[NDArray] = ()
    offsets: Sequence[NDArray] = ()


@dataclass(frozen=True)
class Shown:
    """What a page shows.

    Attributes:
        title: Of the page.
        about: What was looked at, in a line.
        overview: Every head.
        details: Maps by module.
        query: Whose rows these are, in words.
        pattern: Of the sparse rows, "" for none.
        mass: Share of dense attention that a pattern catches of a head that bears it.
        importance: What importance is, in words; "" without.
        picture: What the model saw or made, with its name; None without.
        rollout: Rollout on the grid, and whose, in words; None without, with the reason.
        notes: Further lines, such as scores.
        pruned: What zeroing each head does, by module and name, where heads were pruned: for maps.json.
    """

    title: str
    about: str
    overview: Overview
    details: dict[str, Details]
    query: str
    pattern: str = ""
    mass: float = 0.9
    importance: str = ""
    picture: tuple[Picture, str] | None = None
    rollout: tuple[NDArray | None, str] = (None, "")
    notes: Sequence[str] = field(default_factory=tuple)
    pruned: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)


def rollout_picture(shown: Shown) -> Picture:
    """Rollout, over the picture where both have one aspect."""
    values = shown.rollout[0]
    assert values is not None
    if (
        shown.picture is not None
        and values.shape[0] * shown.picture[0].width == values.shape[1] * shown.picture[0].height
    ):
        return heat.over(heat.enlarged(shown.picture[0]), values)
    return heat.picture(heat.colors(values, 0, heat.high(values)), 320)
