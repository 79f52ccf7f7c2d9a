"""Looks at steps before a GPU's time is spent on them: what they need, and whether their scripts take their options."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from scripts.gpu.steps import Step

PACKAGE = "package "


def missing(step: Step, root: Path) -> list[str]:
    """What a step needs and is not there."""
    return [each for each in step.needs if not _is_there(each, root)]


def _is_there(need: str, root: Path) -> bool:
    if need.startswith(PACKAGE):
        try:
            return importlib.util.find_spec(need.removeprefix(PACKAGE)) is not None
        except Exception:
            # Of a.b, a is missing, or breaks while it is imported: other steps are worth running.
            return False
    return any(root.glob(need))


def problems(steps: Sequence[Step], root: Path) -> dict[str, list[str]]:
    """What is wrong with steps, by name: needs that nothing before them makes, and commands that are not understood."""
    found: dict[str, list[str]] = {}
    made: list[str] = []
    for step in steps:
        lacks = [each for each in missing(step, root) if not any(fnmatch(each, glob) for glob in made)]
        wrong = [f"needs {each}, which is not there" for each in lacks]
        if reason := misunderstood(step.planned(step.seconds)):
            wrong.append(reason)
        if wrong:
            found[step.name] = wrong
        made += [*step.continues, *step.keeps, *step.makes]
    return found


def brought(steps: Sequence[Step], root: Path) -> dict[str, int]:
    """Bytes of each path that steps need and that is there: what has to be on the machine beside the checkout."""
    found = {}
    for need in dict.fromkeys(need for step in steps for need in step.needs if not need.startswith(PACKAGE)):
        for path in sorted(root.glob(need)):
            files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
            found[str(path.relative_to(root))] = sum(file.stat().st_size for file in files)
    return found


class _Parsed(Exception):
    """The options were read: nothing more is asked."""


def misunderstood(words: Sequence[str]) -> str:
    """Why a command is not understood; empty if it is. Of `python -m scripts...` the script's own parser reads them.

    Args:
        words: The command.
    """
    name = words[2] if list(words[:2]) == ["python", "-m"] and len(words) > 2 else ""
    if not name.startswith("scripts."):
        # Nobody knows what else would begin to run.
        return ""
    if importlib.util.find_spec(name) is None:
        return f"there is no module {name}"
    said: list[str] = []
    with _only_parsing(said), _arguments(name, words[3:]):
        try:
            getattr(importlib.import_module(name), "main", lambda: None)()
        except _Parsed:
            return ""
        except SystemExit as ended:
            return f"{name}: {' '.join(said) or ended.code}"
        except (ImportError, ValueError) as error:
            return f"{name}: {error}"
    return f"{name} does not read its options with argparse"


@contextmanager
def _only_parsing(said: list[str]) -> Iterator[None]:
    """Parsers raise `_Parsed` instead of returning, and say what is wrong into a list."""
    original: Callable[..., Any] = argparse.ArgumentParser.parse_args
    error = argparse.ArgumentParser.error

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        original(self, args, namespace)
        raise _Parsed

    def tell(self: argparse.ArgumentParser, message: str) -> Any:
        said.append(message)
        raise SystemExit(2)

    argparse.ArgumentParser.parse_args, argparse.ArgumentParser.error = parse_args, tell
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.error = original, error


@contextmanager
def _arguments(name: str, words: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, [name, *words]
    try:
        yield
    finally:
        sys.argv = before
