"""Every script answers --help without a GPU, and scripts/README.md has each of them with a command that parses."""

import ast
import importlib
import re
import shlex
import sys
import types

import pytest

from tests.docs.test_commands import check_module
from tests.support.places import ROOT

SCRIPTS = ROOT / "scripts"
ROW = re.compile(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = [
    # Of torchrun's options nothing is asked here.
    (shlex.split(re.sub(r"^torchrun .*?-m ", "python -m ", command)), answers, time)
    for command, answers, time in ROW.findall((SCRIPTS / "README.md").read_text())
]


def is_script(path):
    """Whether a file has a main and starts it when it is run."""
    body = ast.parse(path.read_text()).body
    started = any(isinstance(n, ast.If) and ast.unparse(n.test) == "__name__ == '__main__'" for n in body)
    return started and any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in body)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


PYTHON = sorted(module_of(path) for path in SCRIPTS.rglob("*.py") if is_script(path))
# What other scripts source is none that one runs.
SHELL = sorted({f"scripts/{path.name}" for path in SCRIPTS.glob("*.sh")} - {"scripts/setup.sh"})


@pytest.mark.parametrize("name", PYTHON)
def test_help_is_the_script_s_own(name, capsys, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        module.main()
    said = capsys.readouterr().out
    assert not ended.value.code
    assert said.startswith("usage: ") and module.__doc__.splitlines()[0] in said


def test_the_table_has_every_script_and_no_other():
    listed = [words[2] if words[1] == "-m" else words[1] for words, _, _ in ROWS]
    assert sorted(listed) == sorted([*PYTHON, *SHELL])


def test_rows_of_the_table_are_whole():
    table = [line for line in (SCRIPTS / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert len(table) == len(ROWS)
    wrong = [words for words, _, time in ROWS if not re.search(r"not measured|second|minute|hour|^see `scripts", time)]
    assert not wrong, "say how long it takes, or that this is not measured"


@pytest.mark.parametrize("words", [words for words, _, _ in ROWS if words[1] == "-m"], ids=lambda words: words[2])
def test_commands_of_the_table_parse(words, monkeypatch):
    check_module(words[2], words[3:], monkeypatch)


def test_a_main_that_ignores_its_arguments_is_found(monkeypatch):
    script = types.ModuleType("scripts.deaf")
    script.main = lambda: None
    monkeypatch.setitem(sys.modules, "scripts.deaf", script)
    with pytest.raises(pytest.fail.Exception):
        check_module("scripts.deaf", ["--loud"], monkeypatch)
