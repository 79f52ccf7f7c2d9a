"""What attention calls move between ranks."""

from __future__ import annotations

from dataclasses import dataclass

from visattn.patterns.values import whole_number


@dataclass
class Moved:
    """Bytes that one rank sends and receives in the forward passes of calls; the backward moves the same back.

    Calls that get one as `moved` add theirs to it.

    Attributes:
        sent: Keys and values (of Ulysses also queries and outputs) that went to other ranks.
        received: Those that came.
        shared: Outputs of dense queries that were sent to all others to be merged.
    """

    sent: int = 0
    received: int = 0
    shared: int = 0

    def add(self, sent: int = 0, received: int = 0, shared: int = 0) -> None:
        """Count the bytes of a call."""
        for name, value in (("sent", sent), ("received", received), ("shared", shared)):
            whole_number(value, name, 0, high=2**63)
        self.sent += sent
        self.received += received
        self.shared += shared

    @property
    def total(self) -> int:
        """All bytes that went out or came in."""
        return self.sent + self.received + self.shared
