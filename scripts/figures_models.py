"""The table and the counts of docs/diffusers.md, from the records of model families."""

from __future__ import annotations

from collections.abc import Callable

from scripts.results import table
from visattn.pipelines.families import FAMILIES, unknown


def families_table() -> str:
    """A row for each record with something to patch: its name, its classes and the order of its tokens."""
    records = dict.fromkeys(family for family in FAMILIES.values() if not family.nothing)
    return table(
        ["family", "model class", "tokens"],
        [[family.name, ", ".join(family.classes), family.tokens] for family in records],
    )


def families_counts() -> str:
    """How many classes of the release are known, have nothing to sparsify, and have no record."""
    nothing = sum(bool(family.nothing) for family in FAMILIES.values())
    known, left = len(FAMILIES) - nothing, len(unknown.NOT_YET)
    return (
        f"Of diffusers {unknown.RELEASE}, {known} model classes are known, {nothing + len(unknown.NOT_SPARSE)} have "
        f"nothing to sparsify and {left} {'is' if left == 1 else 'are'} not written yet."
    )


def model_tables() -> dict[str, Callable[[], str]]:
    """The tables by name."""
    return {"families": families_table, "families-counts": families_counts}
