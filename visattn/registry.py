"""What the package brings, what other packages bring by entry points, and what a program registers: one table of all.

Every kind of thing has a door: a mapping from names to things, declared by the room that uses them. Nothing is imported
before its name is asked for.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from visattn.entries import PACKAGE, Entry, Plugin, entry_points, resolve

T = TypeVar("T")

# The room that declares each kind of thing.
HOMES = {
    "pattern": "visattn.patterns",
    "backend": "visattn.dispatch",
    "family": "visattn.pipelines.families",
    "attention": "visattn.models.swap.records",
    "adapter": "visattn.request",
}


class Registration:
    """What was registered; `remove()` or the end of a `with` block takes it back."""

    def __init__(self, door: Door[Any], entries: Mapping[str, Entry]) -> None:
        self._door, self._entries = door, dict(entries)

    def remove(self) -> None:
        """Take back what has not been replaced since; a second call does nothing."""
        self._door.withdraw(self._entries)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Door(Mapping[str, T], Generic[T]):
    """Things of one kind by name: the package's own, those of other packages, those registered at run time.

    A thing that cannot be imported is broken: asking for it raises a ValueError, the others stay as they are.
    """

    def __init__(
        self, registry: Registry, kind: str, own: Mapping[str, object], accept: Callable[[str, Any], T]
    ) -> None:
        self.kind, self._registry, self._accept = kind, registry, accept
        self._own = {name: Entry(target) for name, target in own.items()}

    def __getitem__(self, name: str) -> T:
        entry = self._entry(name)
        if entry is None:
            raise KeyError(name)
        if entry.value is None:
            self._load(name, entry)
        if entry.problem:
            raise ValueError(f"{self.kind} {name!r} of {entry.source} cannot be used: {entry.problem}")
        return cast("T", entry.value)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._registry.added(self.kind) if name not in self._own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._entry(name) is not None

    @property
    def own(self) -> tuple[str, ...]:
        """Names of what comes with the package."""
        return tuple(self._own)

    def is_own(self, name: str) -> bool:
        """Whether it comes with the package."""
        return name in self._own

    def usable(self) -> dict[str, T]:
        """All that can be used, in the order in which it came; warns of what cannot."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except ValueError as error:
                if self.is_own(name):
                    raise
                warnings.warn(f"{error}; see `visattn doctor`", stacklevel=3)
        return found

    def add(self, things: Mapping[str, object], source: str) -> Registration:
        """Register things by name, all of them or none; a class may be replaced by its new definition.

        Args:
            things: Each under its name, or where it is: "module:attribute".
            source: Who brings them.

        Raises:
            ValueError: If one is not of this kind, or its name is taken.
        """
        entries = {}
        for name, thing in things.items():
            entry = Entry(thing, source)
            if not isinstance(thing, str):
                entry.value = self._accept(name, thing)
            taken = self._entry(name)
            if taken is not None and (name in self._own or not taken.is_again(thing)):
                raise ValueError(f"{self.kind} {name!r} is that of {taken.whose}: take another name")
            entries[name] = entry
        self._registry.update(self.kind, entries)
        return Registration(self, entries)

    def withdraw(self, entries: Mapping[str, Entry]) -> None:
        """Forget entries that are still under their names."""
        self._registry.withdraw(self.kind, entries)

    def plugins(self) -> list[Plugin]:
        """What did not come with the package, each tried."""
        found = []
        for name, entry in self._registry.added(self.kind).items():
            if name in self._own:
                entry.problem = f"{self.kind} {name!r} is that of visattn itself"
            elif entry.value is None:
                self._load(name, entry)
            found.append(Plugin(self.kind, name, entry.source, entry.problem))
        return found

    def _entry(self, name: str) -> Entry | None:
        return self._own.get(name) or self._registry.added(self.kind).get(name)

    def _load(self, name: str, entry: Entry) -> None:
        """Import and check a thing; what another package does wrong becomes the entry's problem."""
        if entry.problem:
            return
        # Without a lock: the import may register something, or wait for a thread whose import does.
        try:
            entry.value = self._accept(name, resolve(entry.target))
        except (Exception, SystemExit) as error:
            if not entry.source:
                raise
            entry.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"


class Registry:
    """The state behind the doors.

    Attributes:
        version: Grows with every change: the key of whatever is kept of what a door said.
    """

    def __init__(self) -> None:
        self.version = 0
        self._lock = threading.RLock()
        self._doors: dict[str, Door[Any]] = {}
        # Replaced, never changed: readers take no lock.
        self._tables: dict[str, dict[str, Entry]] = {}
        self._scanned = False

    def declare(self, kind: str, own: Mapping[str, object], accept: Callable[[str, Any], T]) -> Door[T]:
        """The door of a kind, opened by the room that uses it.

        Args:
            kind: One of `HOMES`.
            own: What comes with the package by name: things or their places "module:attribute".
            accept: Checks a thing for its name and gives what the door gives; raises a ValueError.
        """
        assert kind in HOMES, kind
        made = Door(self, kind, own, accept)
        self._doors[kind] = made
        return made

    def door(self, kind: str) -> Door[Any]:
        """The door of a kind, whose room is imported if need be."""
        if kind not in self._doors:
            importlib.import_module(HOMES[kind])
        return self._doors[kind]

    def added(self, kind: str) -> Mapping[str, Entry]:
        """What did not come with the package; reads the entry points of installed packages the first time."""
        if not self._scanned:
            self.scan()
        return self._tables.get(kind, {})

    def scan(self) -> None:
        """Read the entry points of the packages that are installed at present; imports none of them."""
        with self._lock:
            self._scanned = True
            found = entry_points()
            for kind in HOMES:
                table = self._tables.get(kind, {})
                kept = {name: entry for name, entry in table.items() if not entry.source.startswith(PACKAGE)}
                for name, entry in found[kind].items():
                    # What could not be imported may be repaired, all else stays as it was loaded.
                    kept.setdefault(name, entry.as_known(table.get(name)))
                self._replace(kind, kept)

    def update(self, kind: str, entries: Mapping[str, Entry]) -> None:
        """Add entries or replace those of the same names."""
        with self._lock:
            self._replace(kind, {**self._tables.get(kind, {}), **entries})

    def withdraw(self, kind: str, entries: Mapping[str, Entry]) -> None:
        """Forget entries that are still under their names."""
        with self._lock:
            table = self._tables.get(kind, {})
            self._replace(kind, {name: entry for name, entry in table.items() if entries.get(name) is not entry})

    def _replace(self, kind: str, table: dict[str, Entry]) -> None:
        if table != self._tables.get(kind, {}):
            self._tables[kind] = table
            self.version += 1


REGISTRY = Registry()
