"""What is no argument: values of every wrong type, and what an error has to be."""

import linecache
import math
import traceback

import numpy as np
import torch

from tests.support.places import ROOT
from visattn import Layout
from visattn.given import said


class Ran(Exception):
    """Arguments were taken: what comes next is no work of a test of arguments."""


class Thing:
    """An object of nobody."""

    def __repr__(self):
        return "<thing>"


# By name; one of them may be what a function takes.
WRONG = {
    "None": None,
    "True": True,
    "3": 3,
    "-1": -1,
    "0.5": 0.5,
    "nan": math.nan,
    "10**30": 10**30,
    "text": "junk",
    "bytes": b"x",
    "[]": [],
    "[None]": [None],
    "{'a': 1}": {"a": 1},
    "thing": Thing(),
    "number": torch.tensor(0.5),
    "tensor": torch.ones(3, 2),
    "array": np.ones(2),
    "function": print,
    "layout": Layout((2, 2)),
    "1j": 1j,
}


def fault(function, given, name):
    """What is wrong with how a function takes wrong values of one argument; None if every error is ours, in a line."""
    found = []
    for label, value in WRONG.items():
        try:
            made = function(**{**given, name: value})
        except (ValueError, TypeError) as error:
            text, frames = str(error), traceback.extract_tb(error.__traceback__)
            line = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
            ours = frames[-1].filename.startswith(str(ROOT)) and line.startswith("raise")
            parts = value if isinstance(value, list) else ()
            words = (name, *(say(each) for each in (value, *parts) for say in (said, str)), type(value).__name__)
            named = any(word in text for word in words)
            if not ours or "\n" in text or not named:
                found.append(f"{label}: {type(error).__name__} {text} at {frames[-1].filename}:{frames[-1].lineno}")
        except Ran:
            continue
        except Exception as error:
            found.append(f"{label}: {type(error).__name__} {error}")
        else:
            if hasattr(made, "remove") and not isinstance(made, list | dict):
                made.remove()
    return found or None
