"""What begins when: steps in their order, as far as cards, cores and result files are free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from scripts.gpu.steps import Step


class Begun(NamedTuple):
    """A step that begins: on which card, with how many seconds, and when it is over at the latest."""

    step: Step
    card: int
    seconds: float
    end: float


@dataclass(frozen=True)
class Machine:
    """Cards and CPU cores, and how many steps that need none for themselves have one card at the same time."""

    cards: int
    cores: int
    sharing: int = 4

    def __post_init__(self) -> None:
        for name in ("cards", "cores", "sharing"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")


@dataclass
class Order:
    """The steps that wait and those that run.

    Attributes:
        machine: What there is.
        waiting: Steps in their order.
        end: Time after which nothing may run.
        running: By name.
        late: Steps that were left out, as the time is over for them.
    """

    machine: Machine
    waiting: list[Step]
    end: float
    running: dict[str, Begun] = field(default_factory=dict)
    late: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = list(self.waiting)

    def begin(self, now: float) -> list[Begun]:
        """Steps that begin now; they count as running until `ended`."""
        found: list[Begun] = []
        closed: set[int] = set()
        cores = self.machine.cores - sum(self._cores(each.step) for each in self.running.values())
        for step in list(self.waiting):
            if self.end - now < step.least:
                self.waiting.remove(step)
                self.late.append(step)
                continue
            if self._held(step):
                continue
            card = self._card(step, closed)
            if card is None or self._cores(step) > cores:
                # Its turn is next: whoever stands behind it does not take what becomes free for it.
                closed.add(self._next_card(step) if card is None else card)
                cores -= self._cores(step) if card is not None else 0
                continue
            cores -= self._cores(step)
            seconds = min(step.seconds, self.end - now)
            begun = self.running[step.name] = Begun(step, card, seconds, now + seconds)
            self.waiting.remove(step)
            found.append(begun)
        return found

    def ended(self, name: str) -> None:
        """A step has ended."""
        del self.running[name]

    def _cores(self, step: Step) -> int:
        return min(step.cores, self.machine.cores)

    def _held(self, step: Step) -> bool:
        """Whether it waits for others: to be behind them, or for a result file."""
        ahead = {each.name for each in self.waiting} | set(self.running)
        files = {file for each in self.running.values() for file in each.step.continues}
        return bool(ahead & set(step.after) or files & set(step.continues))

    def _cards(self, step: Step) -> Iterable[int]:
        return range(self.machine.cards) if step.card is None else [step.card % self.machine.cards]

    def _card(self, step: Step, closed: set[int]) -> int | None:
        """The card with the fewest steps that takes this one."""
        on = {card: [each.step for each in self.running.values() if each.card == card] for card in self._cards(step)}
        room = 1 if step.alone else self.machine.sharing
        free = [
            card
            for card, steps in on.items()
            if card not in closed and len(steps) < room and not any(each.alone for each in steps)
        ]
        return min(free, key=lambda card: len(on[card]), default=None)

    def _next_card(self, step: Step) -> int:
        """The card that is free first, if everyone on it takes all of its time."""
        ends = {card: [each.end for each in self.running.values() if each.card == card] for card in self._cards(step)}
        return min(ends, key=lambda card: max(ends[card], default=0.0))


def simulated(steps: Sequence[Step], machine: Machine, seconds: float) -> tuple[list[tuple[float, Begun]], list[Step]]:
    """Begin of each step if everyone takes all of its time, and the steps that there is no time for."""
    order, now, found = Order(machine, list(steps), seconds), 0.0, []
    while order.waiting or order.running:
        found += [(now, begun) for begun in order.begin(now)]
        if not order.running:
            break
        now = min(each.end for each in order.running.values())
        for name in [name for name, each in order.running.items() if each.end <= now]:
            order.ended(name)
    return found, order.late
