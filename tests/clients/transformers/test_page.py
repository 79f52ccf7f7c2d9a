"""docs/transformers.md lists every tower that is known, with its tokens, and what has no pattern."""

import re

import pytest

pytest.importorskip("transformers")

from scripts.pages import ROOT
from scripts.towers import render, table
from visattn.clients.transformers.records import RECORDS, REFUSED

PAGE = ROOT / "docs" / "transformers.md"


def test_the_table_is_that_of_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert render(page) == page, "run python -m scripts.towers"
    rows = re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.MULTILINE)
    assert len(rows) == len(set(rows)) == len(RECORDS) + len(REFUSED) and len(RECORDS) == 49
    assert "| `yolos` | YOLOS | rows x columns | 1 | num_detection_tokens |" in table()
