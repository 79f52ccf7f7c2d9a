"""What a search has measured, a line a measurement, so that a stopped search goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Measurements by key in a file of JSON lines, or in memory alone.

    A line is written when its measurement is done; a last line that a kill has cut is dropped.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """Read what is there.

        Args:
            path: The file; None for memory alone.
            about: What all measurements depend on.

        Raises:
            ValueError: If the file holds measurements of something else.
        """
        self._path = path
        self._known: dict[str, Any] = {}
        own = json.loads(json.dumps(about))
        lines = [] if path is None or not path.is_file() else _lines(path)
        if not lines:
            self._append({"about": own})
            return
        then = lines[0]["about"]
        other = sorted(k for k in {*own, *then} if own.get(k) != then.get(k))
        if other:
            raise ValueError(
                f"{path} holds measurements of {other[0]} {then.get(other[0])!r}, not {own.get(other[0])!r}: delete "
                "it, or name another with --journal"
            )
        self._known = {line["key"]: line["value"] for line in lines[1:] if {"key", "value"} <= line.keys()}

    def get(self, key: Any, measure: Callable[[], Any]) -> Any:
        """The value of a key, measured if it is not known: anything that JSON holds."""
        text = json.dumps(key)
        if text not in self._known:
            value = measure()
            self._known[text] = json.loads(json.dumps(value))
            self._append({"key": text, "value": value})
        return self._known[text]

    def knows(self, key: Any) -> bool:
        """Whether a key was measured."""
        return json.dumps(key) in self._known

    def measured(self) -> list[Any]:
        """Keys of all that was measured, in its order."""
        return [json.loads(text) for text in self._known]

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """What the lines of a file say, the first of them what all measurements depend on; none if there is none yet.

    Raises:
        ValueError: If the file is something else, which nothing may be added to.
    """
    data = path.read_bytes()
    whole, end, cut = data.rpartition(b"\n")
    lines = [line for line in map(_line, whole.splitlines()) if line is not None]
    begin = json.dumps({"about": {}})[: -len("{}}")].encode()
    if lines and isinstance(lines[0].get("about"), dict):
        pass
    elif end or not (cut.startswith(begin) or begin.startswith(cut)):
        raise ValueError(f"{path} holds no measurements of a search: name another with --journal")
    if cut:
        # What is appended begins on a line of its own. In place: another file would not be the one that is locked.
        os.truncate(path, len(whole) + len(end))
    return lines


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
