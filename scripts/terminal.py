"""Draws a command and what it prints as a picture of a terminal.

python -m scripts.terminal docs/pictures/NAME.svg 'COMMAND' ['COMMAND' ...] [--width 110]
"""

from __future__ import annotations

import argparse
import html
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from scripts.results import ROOT
from visattn.files import written_whole

THEME = TerminalTheme((255, 255, 255), (32, 33, 36), [(32, 33, 36)] * 8)


def ran(command: str) -> str:
    """What a shell prints for a command, run in the repository; what it says beside that goes where ours does.

    Raises:
        SystemExit: If it fails.
    """
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command}: exit status {done.returncode}")
    return done.stdout.rstrip("\n")


def drawn(sessions: Sequence[tuple[str, str]], width: int) -> str:
    """Commands and their output as an SVG that loads nothing.

    Args:
        sessions: Pairs of a command and what it printed.
        width: Characters of a line.
    """
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor")
    for command, output in sessions:
        console.print(Text.assemble(("$ ", "bold"), (command, "bold")))
        console.print(Text(output))
    picture = console.export_svg(title="", theme=THEME, unique_id="terminal")
    # The fonts of the template come from another host, which a picture may not ask.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL).replace("Fira Code", "monospace")


def shown(picture: Path) -> list[str]:
    """The lines of text that a picture of a terminal shows, prompts and commands included."""
    lines: dict[str, str] = {}
    for line, text in re.findall(r'<text[^>]* y="([^"]+)"[^>]*>(.*?)</text>', picture.read_text("utf-8"), re.DOTALL):
        lines[line] = lines.get(line, "") + html.unescape(text).replace("\xa0", " ")
    return [line.rstrip() for line in lines.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("commands", nargs="+", help="run by a shell in the repository, shown as they stand")
    parser.add_argument("--width", type=int, default=110, help="characters of a line")
    options = parser.parse_args(arguments)
    picture = drawn([(command, ran(command)) for command in options.commands], options.width)
    with written_whole(options.out) as path:
        path.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
