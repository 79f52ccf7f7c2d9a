"""What other libraries say while a command runs: shown when it is done, left out above an error that a user can fix."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Messages:
    """Warnings and log records of other libraries, in their order, each with what shows it."""

    def __init__(self) -> None:
        self._held: list[Callable[[], object]] = []
        self.holding = True

    def hold(self, show: Callable[[], object]) -> None:
        """Keep a message, or show it if it came late."""
        if self.holding:
            self._held.append(show)
        else:
            show()

    def drop(self) -> None:
        """Forget what is held."""
        self._held.clear()

    def release(self) -> None:
        """Show what is held, and from here on everything at once."""
        self.holding = False
        for show in self._held:
            show()
        self._held.clear()


@contextmanager
def held_messages() -> Iterator[Messages]:
    """Hold what other libraries warn of and log until the end of the block; our warnings are a line each, at once."""
    messages = Messages()
    logger_class, shown = logging.getLoggerClass(), warnings.showwarning

    class HoldingLogger(logger_class):
        def callHandlers(self, record: logging.LogRecord) -> None:
            own = super().callHandlers
            messages.hold(lambda: own(record))

    def showwarning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if _warns_itself():
            # As errors are: a line, without the place in the code that it comes from.
            print(f"visattn: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        else:
            messages.hold(lambda: shown(message, *args, **kwargs))

    # Libraries are imported by the commands, so their loggers are made from here on.
    logging.setLoggerClass(HoldingLogger)
    warnings.showwarning = showwarning
    try:
        yield messages
    finally:
        logging.setLoggerClass(logger_class)
        warnings.showwarning = shown
        messages.release()


def _warns_itself() -> bool:
    """Whether the code that is warning is visattn's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "visattn"
