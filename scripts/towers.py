"""Writes the tables of vision towers in docs/transformers.md from their records.

python -m scripts.towers
"""

from __future__ import annotations

from scripts.pages import ROOT, rewrite, with_table
from visattn.clients.transformers import grids
from visattn.clients.transformers.records import RECORDS, REFUSED, Count

PAGE = ROOT / "docs" / "transformers.md"
GRIDS: dict[object, str] = {
    grids.image: "rows x columns",
    grids.video: "frames x rows x columns",
    grids.shapes: "rows x columns of each sample",
    grids.frames: "rows x columns of each frame, merged blocks in order",
    grids.each_frame: "rows x columns of each frame",
    grids.pooled: "rows x columns of each stage, sorted by the pooling",
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


def refused() -> str:
    """The table of what has no pattern."""
    lines = ["| folder of transformers | why |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{folder}` | {why} |" for folder, why in sorted(REFUSED.items()))])


def _count(count: Count) -> str:
    return " + ".join(map(str, count)) or "0"


def render(page: str) -> str:
    """The page with its table as the records are."""
    for name, rows in (("towers", table()), ("refused", refused())):
        page = with_table(page, name, rows)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    rewrite(PAGE, render, __doc__, arguments)


if __name__ == "__main__":
    main()
