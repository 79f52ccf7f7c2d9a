"""Writes the tree of folders in docs/design.md, two levels deep, from the docstrings of the packages.

python -m scripts.tree
"""

from __future__ import annotations

import ast
import re
import subprocess

from scripts.pages import ROOT, rewrite

PAGE = ROOT / "docs" / "design.md"
# Folders without Python to say it themselves.
PLAIN = {
    ".ci": "What must be green before a change lands.",
    ".github": "Templates of issues and pull requests.",
    ".github/workflows": "The same checks on GitHub, for every version that the package claims.",
    "docs": "The pages of the site; each states what it was measured with.",
    "docs/examples": "Whole programs to start from.",
    "docs/pictures": "Pictures that pages show.",
    "docs/reference": "The API, from the docstrings.",
    "docs/results": "Raw results that the tables are rendered from.",
}
LEFT_OUT = {".github/ISSUE_TEMPLATE"}


def folders() -> list[str]:
    """Folders of the checkout to two levels, those that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    parents = {tuple(file.split("/")[:-1][:2]) for file in files if (ROOT / file).is_file()}
    return sorted({"/".join(p[:n]) for p in parents for n in (1, 2) if p} - LEFT_OUT)


def purpose(folder: str) -> str:
    """What a folder is for: the first sentence of its package's docstring.

    Raises:
        ValueError: If nothing says it.
    """
    if folder in PLAIN:
        return PLAIN[folder]
    package = ROOT / folder / "__init__.py"
    text = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) if package.is_file() else None
    if not text:
        raise ValueError(f"{folder}: give {folder}/__init__.py a docstring, or the folder a line in scripts/tree.py")
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0]


def tree() -> str:
    """The tree as text, a folder a line."""
    lines = []
    for folder in folders():
        parent, _, name = folder.rpartition("/")
        lines.append(f"{'  ' * bool(parent)}{name + '/':<{17 if parent else 19}}{purpose(folder)}")
        if folder == "visattn":
            links = sorted(link.name for link in (ROOT / folder).iterdir() if link.is_symlink())
            lines.append(f"  {', '.join(links)}: links to the folders of these names")
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its tree as the checkout is."""
    block = f"<!-- tree -->\n```text\n{tree()}\n```\n<!-- end: tree -->"
    text, count = re.subn(r"<!-- tree -->.*?<!-- end: tree -->", lambda _: block, page, flags=re.DOTALL)
    assert count == 1, f"{PAGE.name} has {count} places for the tree, expected one"
    return text


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    rewrite(PAGE, render, __doc__, arguments)


if __name__ == "__main__":
    main()
