"""The code blocks, commands, links, headings and generated parts of the project's Markdown pages."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*([\w+-]*)[^\n]*$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+\"[^\"]*\")?\)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: The page's file.
        line: Line of the page on which the code starts, from 1.
        language: What stands behind the fence; "sh" for indented blocks, "" for neither.
        code: The code.
    """

    page: Path
    line: int
    language: str
    code: str


def pages() -> list[Path]:
    """Every page that people read: at the top level, in docs, and beside scripts."""
    return sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")})


def with_table(page: str, name: str, rows: str) -> str:
    """A page's text with other rows between the markers of a table."""
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"the page has no place for the table {name}: it needs {begin} and {end}"
    return f"{before}{begin}\n{rows}\n{end}{after}"


def rewrite(
    page: Path, render: Callable[[str], str], about: str | None, arguments: Sequence[str] | None = None
) -> None:
    """Write a page anew: all that a command without options does.

    Args:
        page: Its file.
        render: Makes the new text of the old one.
        about: What the command says of itself.
        arguments: Its words, None for those that this process was started with.
    """
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """The fenced and the indented blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        start = at + 1
        if fence:
            at = start
            while at < len(lines) and lines[at].strip() != fence[2]:
                at += 1
            indent = len(fence[1])
            code = [line[indent:] if line[:indent].isspace() else line for line in lines[start:at]]
            found.append(Block(page, start + 1, fence[3].lower(), "\n".join(code) + "\n"))
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()) and not _in_list(lines, at):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            code = "\n".join(line[4:] for line in lines[start - 1 : at]).rstrip() + "\n"
            found.append(Block(page, start, "sh", code))
            continue
        at += 1
    return found


def _in_list(lines: list[str], at: int) -> bool:
    """Whether an indented line goes on with an item of a list."""
    for line in reversed(lines[:at]):
        if line.strip() and not line.startswith(" "):
            return bool(re.match(r"([-*+]|\d+[.)])\s", line))
    return False


def outside(page: Path) -> list[str]:
    """The page's lines with those of code blocks emptied."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks(page):
        for at in range(block.line - 1, block.line - 1 + block.code.count("\n")):
            lines[at] = ""
    return lines


def commands(code: str) -> list[list[str]]:
    """The commands of a block of shell code as words; comments, prompts and outputs of nothing are left out."""
    joined = re.sub(r"\\\n\s*", " ", code)
    split = (shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines())
    return [words for words in split if words]


def spans(page: Path) -> list[tuple[int, str]]:
    """What stands in single backquotes in the text of a page, as one line each, with their lines."""
    text = "\n".join("" if FENCE.match(line) else line for line in outside(page))
    found = re.finditer(r"(?<!`)`([^`]+)`(?!`)", text)
    return [(text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())) for match in found]


def links(page: Path) -> list[tuple[int, str]]:
    """Targets of links and pictures, with their lines."""
    text = re.sub(r"`[^`\n]*`", lambda code: " " * len(code[0]), "\n".join(outside(page)))
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found: dict[str, int] = {}
    names = set()
    for line in outside(page):
        if heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            count = found.get(name, 0)
            found[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
    return names
