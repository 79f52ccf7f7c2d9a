"""What the documentation's site has beyond docs: a hook of mkdocs (see mkdocs.yml).

- The README, CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and scripts/README.md are pages of it, the licence is a file.
- Below a block of one `visattn show` command stands the picture that it draws, below one of `visattn ... --help` the
  text that it prints.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from typer.testing import CliRunner

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Files outside of docs, by their name on the site.
TOP = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "scripts.md": "scripts/README.md",
    "license.txt": "LICENSE",
    "notice.txt": "NOTICE",
}
BLOCK = re.compile(r"^```sh\n(visattn [^\n]*)\n```$", re.MULTILINE)


def run(words: list[str]) -> str:
    """What a visattn command prints.

    Raises:
        RuntimeError: If it fails.
    """
    from visattn.cli import app

    result = CliRunner().invoke(app, words[1:], prog_name="visattn", env={"COLUMNS": "100"})
    if result.exit_code:
        raise RuntimeError(f"{shlex.join(words)} failed: {result.output} {result.exception!r}")
    return result.output


def shown(markdown: str) -> Iterator[tuple[list[str], str]]:
    """The `visattn show` commands of a page that write a picture, with the picture's name."""
    for line in BLOCK.findall(markdown):
        words = shlex.split(line)
        if words[1] == "show" and "--out" in words:
            yield words, words[words.index("--out") + 1]


def to_pages(markdown: str, up: str | None = None) -> str:
    """Markdown whose links to files of `TOP`, with or without an anchor, lead to their pages on the site.

    Args:
        markdown: The page's text.
        up: The way from a page within docs to docs itself (`""`, `"../"`); None for a page of the top level.
    """
    before, after = ("", "") if up is None else (f"../{up}", up)
    for name, source in TOP.items():
        markdown = re.sub(rf"\]\({re.escape(before + source)}(#[^)\s]*)?\)", rf"]({after}{name}\1)", markdown)
    return markdown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top level, and the pictures that pages draw."""
    from mkdocs.structure.files import File

    with tempfile.TemporaryDirectory() as folder:
        for page in list(files.documentation_pages()):
            for words, name in shown(page.content_string):
                drawn = Path(folder, name)
                run([*words, "--force", "--out", str(drawn)])
                files.append(File.generated(config, f"drawn/{name}", content=drawn.read_bytes()))
    for name, source in TOP.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if "/" in source:
            text = text.replace("](../", "](")
        text = text.replace("](docs/", "](")
        text = to_pages(text)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put pictures and outputs below their commands, and let links to the top level stay on the site."""
    up = "../" * page.file.src_uri.count("/")

    def below(block: re.Match[str]) -> str:
        words = shlex.split(block[1])
        if words[-1] == "--help":
            return f"{block[0]}\n\n```text\n{run(words).strip()}\n```"
        drawn = [f"![{words[2]}]({up}drawn/{name})" for _, name in shown(block[0])]
        return "\n\n".join([block[0], *drawn])

    return BLOCK.sub(below, to_pages(markdown, up))
