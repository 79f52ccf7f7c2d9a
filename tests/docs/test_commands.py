"""Shell commands of the pages: programs and files exist, options are known, quick ones run."""

import argparse
import importlib
import re
import shlex
import tomllib

import pytest
import typer
from typer.testing import CliRunner

from scripts.pages import ROOT, blocks, commands, pages
from visattn.cli import app
from visattn.served import settings
from visattn.tuned import Tuned

COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}:{block.line}: {shlex.join(words)[:60]}")
    for page in pages()
    for block in blocks(page)
    if block.language == "sh"
    for words in commands(block.code)
]
# Run for real; the others of visattn take minutes, or models and pictures that a reader has.
QUICK = {"show", "simulate", "doctor", "models"}
# What comes with git, Python, Debian or the environment, and means the same everywhere.
TOOLS = {"git", "pytest", "cd", "apt-get"}
# Servers that take patterns by the environment.
SERVERS = {"vllm-omni", "sglang"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Parsed(Exception):
    """The options were read, and the work would begin."""


def check_visattn(words, folder, monkeypatch):
    if words[0] in QUICK or words[-1] == "--help":
        monkeypatch.chdir(folder)
        # What `visattn tune` of the same page has written.
        Tuned("FluxTransformer2DModel", 1, (8, 8), {"0": {"0-": "na(window=3x3)"}}).write(folder / "tuned.json")
        result = CliRunner().invoke(app, words, prog_name="visattn")
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"
        return
    command = leaf = typer.main.get_command(app)
    for word in words:
        leaf = leaf.commands.get(word, leaf) if hasattr(leaf, "commands") else leaf
    leaf.callback = lambda **values: None  # everything is read and checked, nothing runs
    with pytest.raises(SystemExit) as ended:
        command.main(args=list(words), prog_name="visattn")
    assert ended.value.code == 0, f"visattn {shlex.join(words)} is not understood"


def check_module(name, words, monkeypatch):
    """A script of ours: its own parser reads the options."""
    module = importlib.import_module(name)
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(Parsed):
        module.main()


def check_python(words, monkeypatch):
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1].startswith("scripts."):
        check_module(words[1], words[2:], monkeypatch)
    else:
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"


def check_torchrun(words, folder, monkeypatch):
    """What several processes run: a module of ours, as `python -m` would."""
    at = words.index("-m")
    assert words[:at] == ["--nproc-per-node", "2"]
    if words[at + 1] == "visattn":
        check_visattn(words[at + 2 :], folder, monkeypatch)
    else:
        check_python(words[at:], monkeypatch)


def check_pip(words):
    assert words[0] == "install"
    for word in words[1:]:
        if match := re.fullmatch(r"(?:visattn|\.)\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_is_real(words, tmp_path, monkeypatch):
    given = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        given.update([words[0].split("=", 1)])
        words = words[1:]
    program, rest = words[0], words[1:]
    program = program.removeprefix(".venv/bin/")
    if program == "visattn":
        check_visattn(rest, tmp_path, monkeypatch)
    elif program in ("python", "python3"):
        check_python(rest, monkeypatch)
    elif program == "torchrun":
        check_torchrun(rest, tmp_path, monkeypatch)
    elif program == "accelerate":
        at = rest.index("-m")
        assert rest[:2] == ["launch", "--num_processes"] and rest[2].isdigit() and at == 3
        assert importlib.util.find_spec(rest[at + 1]), f"no module {rest[at + 1]}"
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif program == "pip":
        check_pip(rest)
    elif program in SERVERS:
        assert settings.request(program, given).schedule.patterns
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        assert program in TOOLS, f"{program} is no program that a reader has from this project"


@pytest.mark.parametrize(
    "command", ["show na --grill 3", "draw", "bench-model x --sizes 3", "generate picture", "classify"]
)
def test_a_wrong_command_is_found(command, tmp_path, monkeypatch):
    with pytest.raises(AssertionError):
        check_visattn(command.split(), tmp_path, monkeypatch)


def test_a_wrong_option_of_a_script_is_found(monkeypatch):
    with pytest.raises(SystemExit):
        check_module("scripts.bench.cpu", ["--quickly"], monkeypatch)
