"""What one attention call moved between ranks."""

from __future__ import annotations

from typing import NamedTuple


class Moved(NamedTuple):
    """Bytes that one rank sent and received in the forward pass of a call; the backward moves the same back.

    Attributes:
        sent: Keys and values (of Ulysses also queries and outputs) that went to other ranks.
        received: Those that came.
        shared: Outputs of dense queries that were sent to all others to be merged.
    """

    sent: int = 0
    received: int = 0
    shared: int = 0

    @property
    def total(self) -> int:
        """All bytes that went out or came in."""
        return self.sent + self.received + self.shared
