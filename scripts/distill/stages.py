"""The stages of a distillation: what learns, and from which inputs, in which share of the run."""

from __future__ import annotations

from dataclasses import dataclass

ROUTER, TRANSFER, ALL = "router", "transfer", "all"
NAMES = (ROUTER, TRANSFER, ALL)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: `router` trains the pattern's own parameters, `transfer` the projections too, both layer by layer on the
            inputs that the teacher's layers get, by what each layer gives (attention transfer: Zhang et al., "LoLCATs:
            On Low-Rank Linearizing of Large Language Models", 2024, section 3.2); `all` trains the student as it runs.
        start: Share of the run that is over when it begins.
        end: Share that is over when it ends.
    """

    name: str
    start: float
    end: float

    @property
    def forced(self) -> bool:
        """Whether each layer gets the inputs of the teacher's."""
        return self.name != ALL

    @property
    def whole(self) -> bool:
        """Whether more learns than the pattern's own parameters."""
        return self.name != ROUTER


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Stages from a text like "router:0.2,all:0.8": names and shares of the run, which add up to 1.

    Raises:
        ValueError: If it is no such text.
    """
    found, start = [], 0.0
    for part in text.split(","):
        name, colon, share = (word.strip() for word in part.partition(":"))
        try:
            length = float(share) if colon else 1.0 - start
        except ValueError:
            length = 0.0
        if name not in NAMES or length <= 0:
            raise ValueError(f"--stages {text!r}: {part!r} is not of the form name:share, names {', '.join(NAMES)}")
        found.append(Stage(name, start, start + length))
        start += length
    if abs(start - 1) > 1e-6:
        raise ValueError(f"--stages {text!r}: the shares are {start:g} of the run, they must add up to 1")
    names = [stage.name for stage in found]
    if names != sorted(set(names), key=NAMES.index):
        raise ValueError(f"--stages {text!r} must be each at most once, in the order {', '.join(NAMES)}")
    return tuple(found)


def stage_at(stages: tuple[Stage, ...], done: float) -> Stage:
    """The stage of a run of which a share is over."""
    return next((stage for stage in stages if done < stage.end - 1e-9), stages[-1])
