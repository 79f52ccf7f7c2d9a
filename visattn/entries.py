"""Things by name that did not come with the package, or are imported when they are asked for; entry points."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any, NamedTuple

# The group of entry points by which other packages bring each kind.
GROUPS = {
    "pattern": "visattn.patterns",
    "backend": "visattn.backends",
    "family": "visattn.families",
    "attention": "visattn.attention",
    "adapter": "visattn.adapters",
}


class Plugin(NamedTuple):
    """Something that did not come with the package.

    Attributes:
        kind: "pattern", "backend", "family", "attention" or "adapter".
        name: What it is called.
        source: Which package or call brought it.
        problem: Why it cannot be used, empty if it can.
    """

    kind: str
    name: str
    source: str
    problem: str


class Entry:
    """One thing under its name.

    Attributes:
        target: The thing, or where it is: "module:attribute".
        source: Who brought it, empty for the package itself.
        problem: Why it cannot be used, empty as far as is known.
    """

    def __init__(self, target: object, source: str = "", problem: str = "") -> None:
        self.target, self.source, self.problem = target, source, problem
        self.value: Any = None

    @property
    def whose(self) -> str:
        """Who brought it, and where it is if that is known."""
        place = f" ({self.target})" if isinstance(self.target, str) and self.source else ""
        return (self.source or "visattn itself") + place

    def as_known(self, old: Entry | None) -> Entry:
        """The entry that was here before, if it is the same and was not broken, else this one."""
        if old is None or old.problem or (old.target, old.source) != (self.target, self.source):
            return self
        return old

    def is_again(self, thing: object) -> bool:
        """Whether a thing is this one, or the new definition of this class, function or object of a class."""
        known = self.target if self.value is None else self.value
        if isinstance(known, str):
            if known == thing:
                return True
            module, _, path = known.partition(":")
            # Its module may be registering it while it is imported.
            known = sys.modules.get(module)
            for part in filter(None, path.split(".")):
                known = getattr(known, part, None)
        return known is thing or (known is not None and _definition(known) == _definition(thing))


def _definition(thing: object) -> object:
    """Where a class or function is defined, or the class of an object; records of visattn are what they hold."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(named, "__module__", ""))
    return thing if module.startswith("visattn.") else (module, named.__qualname__)  # type: ignore[union-attr]


def resolve(target: object) -> object:
    """A thing, imported if only its place "module:attribute" is given."""
    if not isinstance(target, str):
        return target
    module, _, path = target.partition(":")
    found: object = importlib.import_module(module.strip())
    for part in filter(None, path.strip().split(".")):
        found = getattr(found, part)
    return found


# How the sources of entry points begin.
PACKAGE = "package "


def entry_points() -> dict[str, dict[str, Entry]]:
    """The entry points of all kinds; a name that two packages claim is broken, since either might be meant."""
    from importlib import metadata

    found: dict[str, dict[str, Entry]] = {kind: {} for kind in GROUPS}
    try:
        points = metadata.entry_points()
    except Exception as error:  # whatever a damaged installation raises
        warnings.warn(f"the entry points of installed packages cannot be read: {error}", stacklevel=4)
        return found
    for kind, group in GROUPS.items():
        for point in points.select(group=group):
            dist = point.dist
            source = PACKAGE + (f"{dist.name} {dist.version}" if dist is not None else "of unknown name")
            other = found[kind].get(point.name)
            entry = Entry(point.value.partition("[")[0].strip(), source)
            if other is not None and other.target != entry.target:
                entry.source = f"{other.source} and {source}"
                entry.problem = f"both claim the name, as {other.target} and {entry.target}: uninstall one"
            found[kind][point.name] = entry
    return found
