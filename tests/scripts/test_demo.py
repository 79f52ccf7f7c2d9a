"""The demo: two commands of `visattn` in one process, of which the second runs only after the first."""

import sys
from typing import Any

import pytest
import typer

from scripts import demo
from visattn import cli
from visattn.schedule import Schedule


@pytest.fixture
def ran(monkeypatch):
    """What the demo would run; a command whose words have "fails" ends with status 2."""
    words = []

    def main():
        words.append(sys.argv[1:])
        raise SystemExit(2 if "fails" in sys.argv[-2] else 0)

    monkeypatch.setattr(cli, "main", main)
    return words


def test_two_prompts_and_a_clip_are_compared(ran, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "some/where"])
    demo.main()
    images, clip = ran
    assert images[:2] == ["generate", "image"] and images.count("--prompt") == 2 and "some/where" in images
    assert clip[:2] == ["generate", "video"] and "some/where/clip" in clip
    assert all("--compare" in words for words in ran)
    assert capsys.readouterr().out.count("$ visattn generate") == 2


def test_a_command_that_fails_ends_it(ran, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "fails"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2 and len(ran) == 1


@pytest.mark.parametrize("words", [["--help"], ["--out", "x"], ["a", "b"]])
def test_what_is_no_folder_makes_none(ran, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", *words])
    with pytest.raises(SystemExit):
        demo.main()
    assert not ran and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, words", [("image", demo.IMAGES), ("video", demo.CLIP)])
def test_its_commands_are_understood(kind, words):
    """Every option exists, and the pattern is one."""
    command: Any = typer.main.get_command(cli.app)
    command = command.commands["generate"].commands[kind]
    given = command.make_context(kind, list(words)).params
    Schedule.of(given["pattern"], dense_steps=int(given["dense_steps"]))
    assert given["compare"] and int(given["dense_steps"]) < given["steps"]
