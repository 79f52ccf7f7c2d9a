"""Processes of torchrun, for the length of a block: they begin together, and none outlives the error of another."""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from visattn.environment import chosen_device
from visattn.given import real

# Seconds between looks at what the others say.
EVERY = 0.5
# Seconds that a process which failed gets to say so before the others end.
GRACE = 5.0
# Seconds that nobody waits longer than.
DAY = 86400.0
ERROR = "error"
# What transports say in errors when who they talk to is gone or silent.
LOST = ("gloo", "Connection closed", "Connection reset", "NCCL", "imed out")


class Place(NamedTuple):
    """This process among the others.

    Attributes:
        rank: Its number.
        world: How many there are.
        device: Its device: "cuda:1", "cpu".
    """

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0


def started_together() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def together(device: str = "auto", timeout: float = 600.0, silent: float = 60.0) -> Iterator[Place]:
    """Join the processes of a launcher (torchrun) in a process group, NCCL on GPUs and gloo elsewhere.

    When a process leaves the block by an exception, all others end with status 1, and the first of them prints that
    process's message; likewise when one has not been heard of for a while. What waits for an exchange that never comes
    ends after `timeout` in any case.

    Args:
        device: "auto" for a GPU of its own if there are GPUs, "cuda" or "cpu".
        timeout: Seconds after which an exchange is given up.
        silent: Seconds after which a process that says nothing is given up.

    Raises:
        ValueError: If no launcher started this process, or there are fewer GPUs than processes here.
    """
    timeout = real(timeout, "timeout", "seconds, above 0 and below a day", lambda x: 0 < x < DAY)
    silent = real(silent, "silent", "seconds, above 0 and below a day", lambda x: 0 < x < DAY)
    if not started_together():
        raise ValueError(
            "processes that share a model have a launcher: start with torchrun --nproc-per-node 2 -m visattn ..."
        )
    wait = datetime.timedelta(seconds=timeout)
    place = _place(device)
    store, *_ = next(dist.rendezvous("env://", timeout=wait))
    group = dist.PrefixStore("group", store)
    backend = "nccl" if place.device != "cpu" else "gloo"
    own = torch.device(place.device) if backend == "nccl" else None
    dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world, timeout=wait, device_id=own)
    watch = _Watch(dist.PrefixStore("watch", store), place, silent)
    watch.start()
    try:
        yield place
        watch.finish()
    except BaseException as error:
        text = " ".join(str(error).split()) or type(error).__name__
        before = watch.tell(text)
        if before:
            # What went wrong has been said by another process, maybe with the same words.
            if place.first and not before.endswith(f": {text}"):
                print(f"visattn: {before}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            raise ValueError(f"an exchange with other processes broke, as when one of them ends: {error}") from error
        raise
    finally:
        watch.stop()
        dist.destroy_process_group()


def _place(device: str) -> Place:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "auto":
        device = chosen_device(device)
    if device == "cpu":
        return Place(rank, world, "cpu")
    if device != "cuda":
        raise ValueError(f"device {device!r} with several processes must be auto, cuda or cpu: each takes one GPU")
    local = int(os.environ.get("LOCAL_RANK", rank))
    if local >= torch.cuda.device_count():
        raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return Place(rank, world, f"cuda:{local}")


class _Watch:
    """A thread that says that this process is alive, and ends it when another is not or has failed.

    Args:
        store: What all processes read and write.
        place: This process.
        silent: Seconds without a sign after which another is given up.
        end: What ends this process, which may be stuck in an exchange.
    """

    def __init__(self, store: Any, place: Place, silent: float, end: Callable[[int], Any] = os._exit) -> None:
        self._store, self._place, self._silent, self._end = store, place, silent, end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._store.set(f"alive{self._place.rank}", "0")
        self._thread.start()

    def tell(self, text: str) -> str:
        """Say that this process has failed; what another has said before, empty if none has."""
        own = f"{self._place.rank} {text}"
        try:
            said = self._store.compare_set(ERROR, "", own).decode()
        except RuntimeError:
            # Who keeps the store has gone: there is nobody to tell.
            return ""
        # Where this process keeps the store itself, the others read that before it goes.
        time.sleep(2 * EVERY)
        return "" if said == own else _words(said)

    def finish(self) -> None:
        """Wait until all processes are done: one that is early would look like one that is gone."""
        dist.barrier()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join(5)

    def _run(self) -> None:
        counts: dict[int, tuple[bytes, float]] = {}
        number = 0
        while not self._stopped.wait(EVERY):
            number += 1
            try:
                text = self._look(counts, number)
            except RuntimeError:
                text = "the process that keeps the others together is gone"
            if text and not self._stopped.wait(GRACE):
                if self._place.first or "keeps the others" in text:
                    print(f"visattn: {text}", file=sys.stderr, flush=True)
                self._end(1)
                return

    def _look(self, counts: dict[int, tuple[bytes, float]], number: int) -> str:
        """Why this process must end, empty if all is well."""
        store, place = self._store, self._place
        store.set(f"alive{place.rank}", str(number))
        if store.check([ERROR]):
            said = store.get(ERROR).decode()
            return "" if said.startswith(f"{place.rank} ") else _words(said)
        for rank in range(place.world):
            if rank == place.rank or not store.check([f"alive{rank}"]):
                continue
            count, since = store.get(f"alive{rank}"), counts.get(rank)
            if since is None or since[0] != count:
                counts[rank] = count, time.monotonic()
            elif time.monotonic() - since[1] > self._silent:
                return f"process {rank} has said nothing for {self._silent:.0f} s: it or its machine is gone"
        return ""


def _words(said: str) -> str:
    """What a process has said, "3 no such file", in words."""
    rank, _, text = said.partition(" ")
    return f"process {rank}: {text}"
