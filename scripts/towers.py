"""Writes the table of vision towers in docs/transformers.md from their records.

python -m scripts.towers
"""

from __future__ import annotations

import argparse
import re

from scripts.pages import ROOT
from visattn.clients.transformers import grids
from visattn.clients.transformers.records import RECORDS, Count

PAGE = ROOT / "docs" / "transformers.md"
GRIDS: dict[object, str] = {
    grids.image: "rows x columns",
    grids.video: "frames x rows x columns",
    grids.shapes: "rows x columns of each sample",
    grids.frames: "rows x columns of each frame, merged blocks in order",
    grids.elsewhere: "rows x columns of each stage",
}


def table() -> str:
    """The table, a record a row."""
    lines = [
        "| folder of transformers | models | grid | tokens before | tokens after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in sorted(RECORDS, key=lambda record: record.folder):
        grid = f"refused: {record.refused}" if record.refused else GRIDS[record.reader]
        cells = f"`{record.folder}`", record.models, grid, _count(record.prefix), _count(record.suffix)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(count: Count) -> str:
    return " + ".join(map(str, count)) or "0"


def render(page: str) -> str:
    """The page with its table as the records are."""
    block = f"<!-- table: towers -->\n{table()}\n<!-- end: towers -->"
    text, count = re.subn(r"<!-- table: towers -->.*?<!-- end: towers -->", lambda _: block, page, flags=re.DOTALL)
    assert count == 1, f"{PAGE.name} has {count} places for the table, expected one"
    return text


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
