"""What memory there is: what cannot fit is told before it is tried, and errors of too little of it are known."""

from __future__ import annotations

import os


def machine_memory() -> int | None:
    """Bytes of this machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_room(needed: int, what: str, fix: str) -> None:
    """Refuse what this machine's memory cannot hold, before the system ends the process for it.

    Args:
        needed: Bytes at least.
        what: What needs them, the beginning of the error.
        fix: What to do, the end of it.

    Raises:
        ValueError: If `needed` is more than the machine has.
    """
    room = machine_memory()
    if room is not None and needed > room:
        raise ValueError(
            f"{what} would take {needed / 2**30:,.0f} GiB, and this machine has {room / 2**30:,.0f}: {fix}"
        )


def is_shortage(error: BaseException) -> bool:
    """Whether an error of Python, numpy or torch says that memory could not be had."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError, and so is what its CPU allocator raises.
    words = ("out of memory", "allocate memory", "calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
