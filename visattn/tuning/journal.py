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
        if path is not None and path.is_file():
            read = (_line(text) for text in path.read_text(encoding="utf-8").splitlines())
            lines = [line for line in read if line is not None]
            if lines:
                other = sorted(k for k in {*own, *lines[0]["about"]} if own.get(k) != lines[0]["about"].get(k))
                if other:
                    raise ValueError(
                        f"{path} holds measurements of {other[0]} {lines[0]['about'].get(other[0])!r}, not "
                        f"{own.get(other[0])!r}: delete it, or name another with --journal"
                    )
                self._known = {line["key"]: line["value"] for line in lines[1:]}
                # What is appended begins on a line of its own.
                self._rewrite(lines)
                return
        self._append({"about": own})

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

    def _rewrite(self, lines: list[Any]) -> None:
        from visattn.files import written_whole

        assert self._path is not None
        with written_whole(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
