"""The file of a search over heads: one line for each batch of pictures, written when it is scored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from visattn.files import alone, written_whole

# Layer and head.
Head = tuple[str, int]


class Trials:
    """Scores by heads and seed, kept in a file that a killed process leaves readable.

    Args:
        path: The file; the lines it has are taken over, an unfinished last one is cut off.
        settings: What all scores have in common.

    Raises:
        ValueError: On entering, if the file has scores with other settings, is something else, or another search has
            it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = Path(path)
        # As they are read back.
        self._settings = json.loads(json.dumps(settings, default=str))
        self._scores: dict[tuple[tuple[Head, ...], int], list[float]] = {}
        self._file: TextIO | None = None
        self._open = ExitStack()

    def __enter__(self) -> Trials:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(alone(self._path))
            self._begin(stack)
            self._open = stack.pop_all()
        return self

    def _begin(self, stack: ExitStack) -> None:
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole, _, _ = text.rpartition("\n")
        lines = whole.split("\n") if whole else []
        self._take(lines)
        if len(whole) < len(text.rstrip("\n")):
            with written_whole(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._file = stack.enter_context(self._path.open("a", encoding="utf-8"))
        if not lines:
            self._write({"settings": self._settings})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def get(self, heads: Iterable[Head], seed: int) -> list[float] | None:
        """Scores of the prompts with some heads, in any order, and a seed; None if they are not there."""
        return self._scores.get(_key(heads, seed))

    def put(self, heads: Iterable[Head], seed: int, scores: list[float]) -> None:
        """Keep scores."""
        key = _key(heads, seed)
        self._scores[key] = scores
        self._write({"heads": [list(head) for head in key[0]], "seed": seed, "scores": scores})

    def _take(self, lines: list[str]) -> None:
        try:
            found = [json.loads(line) for line in lines]
            settings = found[0]["settings"] if found else self._settings
            for each in found[1:]:
                heads = [(layer, head) for layer, head in each["heads"]]
                self._scores[_key(heads, each["seed"])] = each["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is no file of a search over heads: name another one") from error
        other = [name for name in self._settings if settings.get(name) != self._settings[name]]
        if other:
            then, now = settings.get(other[0]), self._settings[other[0]]
            raise ValueError(f"{self._path} has scores of {other[0]} {then!r}, not {now!r}: name another file")

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _key(heads: Iterable[Head], seed: int) -> tuple[tuple[Head, ...], int]:
    return tuple(sorted(heads)), seed
