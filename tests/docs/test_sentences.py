"""Commands in the sentences of the pages, often only their beginning: programs, files and options exist."""

import argparse
import importlib
import re
import shlex

import pytest
import typer

from scripts.pages import ROOT, pages, spans
from tests.docs.test_commands import Parsed, check_pip
from visattn.cli import app

# Names the commands and options of the time that each of its lines is of.
HISTORY = "CHANGELOG.md"
SPANS = [
    pytest.param(shlex.split(code), id=f"{page.relative_to(ROOT)}:{line}: {code[:60]}")
    for page in pages()
    if page.name != HISTORY
    for line, code in spans(page)
    if re.match(r"(visattn|python3?|bash|torchrun|pip) ", code) and "ROOM" not in code
]


def options_of(command):
    """Options of a command, and of all commands of a group."""
    own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def check_visattn(words):
    leaf, known = typer.main.get_command(app), {"--help"}
    for word in words:
        if word.isupper() or not hasattr(leaf, "commands"):
            break
        if not word.startswith("-"):
            assert word in leaf.commands, f"visattn has no command {word}"
            leaf = leaf.commands[word]
    assert {word for word in words if word.startswith("--")} <= known | options_of(leaf)


def check_module(name, words, monkeypatch):
    """Options of a script are those of its parser, or of a parser below that."""
    parsers = []

    def parse_args(self, args=None, namespace=None):
        parsers.append(self)
        raise Parsed

    module = importlib.import_module(name)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(Parsed):
        module.main()
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("words", SPANS)
def test_what_a_sentence_calls_is_real(words, monkeypatch):
    program, rest = words[0], words[1:]
    if program == "torchrun" and "-m" in rest:
        program, rest = "python", rest[rest.index("-m") :]
    if program == "visattn":
        check_visattn(rest)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif program == "pip":
        check_pip(rest)
    elif rest[0] == "-m" and rest[1].startswith("scripts."):
        check_module(rest[1], rest[2:], monkeypatch)
    elif rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"


@pytest.mark.parametrize("command", ["generate picture", "tune --psnrs 3", "bench --suites"])
def test_a_wrong_command_of_visattn_is_found(command):
    with pytest.raises(AssertionError):
        check_visattn(command.split())


def test_a_wrong_option_of_a_script_is_found(monkeypatch):
    check_module("scripts.gpu.queue", ["check", "--seconds", "3"], monkeypatch)
    with pytest.raises(AssertionError):
        check_module("scripts.figures", ["measure", "--quickly"], monkeypatch)


def test_spans_are_read_over_the_ends_of_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a `visattn\nshow` b\n\n```sh\n`no`\n```\n`c`\n")
    assert spans(page) == [(1, "visattn show"), (7, "c")]
