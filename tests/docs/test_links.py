"""Links, pictures and names of files in the pages."""

import re
import subprocess

import pytest

from scripts.pages import ROOT, anchors, links, outside, pages
from scripts.site import to_pages

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]


def broken(page):
    """Links of a page that lead nowhere, with their lines."""
    wrong = []
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append((line, target))
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n[a](#one-two) [b](#two) [`c`](no.md)\n![d](page.md)\n"
        "\n```sh\n[e](not-a-link)\n```\n[f](page.md#x)\n"
    )
    assert broken(page) == [(3, "#two"), (3, "no.md"), (9, "page.md#x")]


@pytest.mark.parametrize("page", [page for page in PAGES if page.values[0].is_relative_to(ROOT / "docs")])
def test_links_out_of_docs_are_pages_of_the_site(page):
    folder = page.parent.relative_to(ROOT / "docs")
    markdown = to_pages(page.read_text(encoding="utf-8"), "../" * len(folder.parts))
    targets = re.findall(r"\]\(((?:\.\./)+[^)\s#]*)", markdown)
    assert not [target for target in targets if not (page.parent / target).resolve().is_relative_to(ROOT / "docs")]


def test_links_keep_their_anchors_on_the_site():
    assert to_pages("[a](../README.md#b) [c](../LICENSE)", "") == "[a](index.md#b) [c](license.txt)"
    assert to_pages("[a](README.md) [b](scripts/README.md#c)") == "[a](index.md) [b](scripts.md#c)"


@pytest.fixture(scope="module")
def tracked():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: run this test in a clone")
    return done.stdout.split()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page, tracked):
    # `tests/models/test_swap.py` is a path from the top, `test_swap.py` a script of that name anywhere; names of other
    # kinds without a folder are files that commands write.
    tops = {name.partition("/")[0] for name in tracked}
    scripts = {name.rpartition("/")[2] for name in tracked if name.endswith((".py", ".sh"))}
    wrong = []
    for number, line in enumerate(outside(page), 1):
        for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.[a-z]+)`", line):
            folder = name.partition("/")[0] if "/" in name else ""
            inside = folder in tops and name not in tracked
            if inside or (not folder and name.endswith((".py", ".sh")) and name not in scripts):
                wrong.append((number, name))
    assert not wrong
