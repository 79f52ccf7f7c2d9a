"""The figures of the pages are those of docs/results, and the README's patterns parse."""

import re

import pytest

from scripts import figures
from scripts.pages import anchors
from tests.support.places import ROOT
from visattn import parse

README = (ROOT / "README.md").read_text()


def test_tables_are_rendered_from_the_results():
    pages = [page.read_text() for page in figures.PAGES]
    assert [figures.rendered(page) for page in pages] == pages
    for name in figures.TABLES:
        assert sum(page.count(f"<!-- table: {name} -->") for page in pages) >= 1


@pytest.mark.parametrize("text", re.findall(r"^\| `(\w+.*?)` \| .*\|$", README, re.MULTILINE))
def test_every_pattern_of_the_table_parses(text):
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("link", re.findall(r"\]\(((?:docs|scripts)[^)]*)\)", README))
def test_every_link_leads_somewhere(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists() and (not anchor or anchor in anchors(ROOT / path))


def test_what_is_measured_again_is_of_this_machine_alone(tmp_path, monkeypatch):
    for name in ("ROOT", "RESULTS"):
        monkeypatch.setattr(figures, name, tmp_path)
    write = "python -c \"import sys; print(1, file=open(sys.argv[1], 'a'))\" "
    monkeypatch.setattr(figures, "COMMANDS", {"a": write + "{out}", "b": write + "{folder}/report.json"})
    (tmp_path / "a.json").write_text("another machine's\n")
    for _ in range(2):
        figures.measure(["a", "b"])
        # Nothing of before is gone on with, neither of the result nor of the last whole run.
        assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text() == "1\n"
