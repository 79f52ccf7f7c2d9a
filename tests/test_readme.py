"""The figures of the pages are those of docs/results, and the README's patterns parse."""

import importlib.util
import re
from pathlib import Path

import pytest

from visattn import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_rendered_from_the_results():
    module = figures()
    pages = [page.read_text() for page in module.PAGES]
    assert [module.rendered(page) for page in pages] == pages
    for name in module.TABLES:
        assert sum(page.count(f"<!-- table: {name} -->") for page in pages) >= 1


@pytest.mark.parametrize("text", re.findall(r"^\| `(\w+.*?)` \| .*\|$", README, re.MULTILINE))
def test_every_pattern_of_the_table_parses(text):
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize("link", re.findall(r"\]\(((?:docs|scripts)[^)]*)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
