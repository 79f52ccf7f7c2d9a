"""Other libraries' warnings and log records while a command runs, and the one line of an error."""

import logging
import warnings

import pytest

from tests.support.forks import in_forks
from visattn.cli.messages import held_messages

# A command that warns as libraries do, then ends in one of the ways that commands end.
COMMAND = """
import logging, sys, warnings
from visattn import cli
from visattn.patterns import parse

@cli.app.command()
def noisy(end: str):
    logging.getLogger("a_library").warning("logged")
    own = logging.getLogger("a_library.with_a_handler")
    own.addHandler(logging.StreamHandler())
    own.propagate = False
    own.error("handled")
    exec(compile("import warnings; warnings.warn('warned')", "library.py", "exec"), {"__name__": "a_library"})
    exec(compile("import warnings; warnings.warn('of ours')", "ours.py", "exec"), {"__name__": "visattn.pipelines"})
    if end == "error":
        parse("na(window=0)")
    if end == "bug":
        raise RuntimeError("a bug")
    if end == "memory":
        import torch

        torch.empty(2**60)
    print("done", file=sys.stderr, flush=True)

cli.main()
"""


CALLS = [("error",), ("well",), ("memory",), ("bug",), ("error", "--debug")]


@pytest.fixture(scope="module")
def run():
    calls = [(["noisy", *words], {}) for words in CALLS]
    ended = dict(zip(CALLS, in_forks("import torch, visattn.cli, visattn.patterns", COMMAND, calls), strict=True))
    return lambda *words: ended[words]


def places(text, *words):
    return [text.index(word) for word in words]


def test_an_error_is_one_line_below_our_own_warnings_only(run):
    done = run("error")
    assert done.returncode == 2
    assert "of ours" in done.stderr and done.stderr.splitlines()[-1].startswith("visattn: window=0 must be")
    assert not [word for word in ("logged", "handled", "warned") if word in done.stderr]


def test_our_own_warnings_are_lines_without_a_place(run):
    assert "visattn: warning: of ours\n" in run("well").stderr


def test_too_little_memory_is_a_line_that_says_what_to_do(run):
    done = run("memory")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "enforce fail" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("visattn: this needs more memory than there is (")
    assert last.endswith("choose a smaller size, grid or batch")


@pytest.mark.parametrize("end", ["well", "bug"])
def test_whatever_else_ends_a_command_shows_them(run, end):
    done = run(end)
    assert done.returncode == (0 if end == "well" else 1)
    found = places(done.stderr, "of ours", *(["done"] if end == "well" else []), "logged", "handled", "warned")
    assert found == sorted(found)
    assert ("RuntimeError: a bug" in done.stderr) == (end == "bug")


def test_debug_shows_them_at_once(run):
    done = run("error", "--debug")
    found = places(done.stderr, "logged", "handled", "warned", "of ours", "Traceback")
    assert found == sorted(found)


def test_nothing_stays_behind():
    before = logging.getLoggerClass(), warnings.showwarning
    with held_messages():
        logger = logging.getLogger("made while messages were held")
        assert type(logger) is not before[0]
    assert (logging.getLoggerClass(), warnings.showwarning) == before
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    logger.warning("later")
    assert len(records) == 1, "a logger that was made then works as any other"
