"""Parameters of dynamic patterns that exclude each other."""

from __future__ import annotations

from typing import Any

from visattn.patterns.values import is_number, real_number


def checked_together(pattern: Any) -> dict[str, Any]:
    """`skip` and `alike` of a dynamic pattern in the form that equal patterns share.

    Raises:
        ValueError: If they are out of range, or parameters exclude each other.
    """
    if pattern.score.startswith("tree") and pattern.per != "row":
        raise ValueError(f"score={pattern.score} searches row by row: leave per={pattern.per} out")
    if not is_number(pattern.skip) or not 0 <= pattern.skip < 1:
        raise ValueError(f"skip={pattern.skip!r} must be a share of the largest weight, from 0 to below 1")
    if pattern.skip and pattern.rest != "drop":
        raise ValueError(
            f"skip={real_number(pattern.skip)} leaves what it passes over out: leave rest={pattern.rest} out, or skip"
        )
    causal = pattern.causal is True or (isinstance(pattern.causal, tuple) and any(pattern.causal))
    if causal:
        name = pattern.score.split("(")[0]
        given = [
            text
            for text, bad in (
                (f"rest={pattern.rest}", pattern.rest != "drop"),
                (f"skip={pattern.skip}", bool(pattern.skip)),
                (f"score={pattern.score}", name in ("lowbit", "tree")),
                ("bar=diag", getattr(pattern, "bar", "exact") == "diag"),
            )
            if bad
        ]
        if given:
            raise ValueError(
                "causal is for means, parts, bounds and diagonals of blocks, and what is not listed is left out: leave "
                f"{' and '.join(given)} out"
            )
    found: dict[str, Any] = {"skip": real_number(pattern.skip)}
    if pattern.alike is None:
        return found
    if not is_number(pattern.alike) or not -1 <= pattern.alike < 1:
        raise ValueError(f"alike={pattern.alike!r} must be from -1 to below 1: a mean product of unit vectors")
    if pattern.per != "row" or pattern.share != 1:
        raise ValueError("alike is judged head by head for each row: leave per and share out")
    return found | {"alike": real_number(pattern.alike)}
