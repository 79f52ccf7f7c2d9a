"""The measured results in docs/results, and tables of them in Markdown."""

from __future__ import annotations

import json
from typing import Any

from scripts.pages import ROOT

RESULTS = ROOT / "docs" / "results"


def result(name: str) -> dict[str, Any]:
    """A measured result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
