"""What scripts are asked for on a command line: types of options, and errors that a user can fix as one line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from visattn.cli.errors import fixable
from visattn.files import alone, made_folder

# Seeds of steps are made of those of runs by factors, and torch takes 64 bits.
MOST_SEED = 2**32 - 1


@contextmanager
def told(name: str) -> Iterator[None]:
    """Ends a script with one line for what a user can fix; faults of the program keep their traceback."""
    try:
        yield
    except Exception as error:
        said = fixable(error)
        if not said:
            raise
        raise SystemExit(f"{name}: {said}") from error


def only_run(folder: Path) -> AbstractContextManager[None]:
    """The folder of a run, which no other run may write to meanwhile; the first process has it for all of a launcher.

    Raises:
        ValueError: If another run has it, or it cannot be written.
    """
    return alone(made_folder(folder)) if os.environ.get("RANK", "0") == "0" else nullcontext()


def only_writer(file: Path | None) -> AbstractContextManager[None]:
    """The result file of a run, which no other run may write to meanwhile: it would lose what this one adds.

    Raises:
        ValueError: If another run has it, or its folder cannot be written.
    """
    if file is None:
        return nullcontext()
    made_folder(file.parent)
    return alone(file)


def check_seed(seed: int) -> None:
    """Checks the seed of a run.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"--seed {seed} must be from 0 to {MOST_SEED}")


def _option(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse, whose errors name the option and show the text."""

    def read(text: str) -> Any:
        try:
            return check(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _number(text: str, kind: Callable[[str], float], what: str, fits: Callable[[float], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise ValueError(f"{text!r} must be {what}")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    made_folder(path.parent)
    return path


def _device(text: str) -> str:
    """The name of a device of whatever machine: what this one has is looked at where it is used."""
    import torch

    try:
        torch.device("cuda" if text == "auto" else text)
    except RuntimeError:
        raise ValueError(f"{text!r} is no name of a device: pass one like cpu, cuda or cuda:1") from None
    return text


count = _option(lambda text: _number(text, int, "a whole number of at least 1", lambda value: value >= 1))
number = _option(lambda text: _number(text, float, "a number", lambda value: not math.isnan(value)))
seed = _option(lambda text: _number(text, int, f"from 0 to {MOST_SEED}", lambda value: 0 <= value <= MOST_SEED))
# A file for results: its folder is made, and nobody measures for minutes what cannot be written.
file_to_write = _option(_file)
device = _option(_device)


def like(name: str, default: Any) -> Callable[[str], Any]:
    """The type of an option for a field of settings, by its name and default."""
    return seed if name == "seed" else number if isinstance(default, float) else type(default)
