"""Which models of the installed timm can be swapped, and why the others cannot: the tables of docs/timm.md.

python -m scripts.timm_models            # writes the tables from the result and the records
python -m scripts.timm_models --look     # builds every model first, without weights, and writes the result
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from typing import Any

from scripts.pages import ROOT, with_table
from visattn.files import write_json

PAGE = ROOT / "docs" / "timm.md"
RESULT = ROOT / "docs" / "results" / "timm-models.json"


def answer(name: str) -> str:
    """The classes that are swapped in a model of timm, the reason against it in brackets, or "" if nothing attends."""
    import timm

    from visattn.models.swap.records import name_of_record
    from visattn.models.swap.refused import refusal_of
    from visattn.models.swap.sites import find_sites

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, device="meta")
    try:
        sites = [site for site in find_sites(model, name) if not site.foreign]
    except ValueError as error:
        attends = any(refusal_of(module) or hasattr(module, "partition_block") for module in model.modules())
        return f"({str(error).partition('swap: ')[2]})" if attends else ""
    return ", ".join(sorted({name_of_record(site.module) for site in sites}))


def known() -> list[str]:
    """What the result depends on: names of the classes with a record or a reason."""
    from visattn.models.swap.records import RECORDS
    from visattn.models.swap.refused import REFUSED

    return sorted({*RECORDS, *REFUSED})


def look() -> dict[str, Any]:
    """The answers for all models."""
    import timm

    return {"timm": timm.__version__, "known": known(), "models": {name: answer(name) for name in names()}}


def names() -> list[str]:
    """The models of timm itself, those of its own tests aside."""
    import timm

    found = timm.list_models(exclude_filters=["test_*"])
    return [name for name in found if timm.models.model_entrypoint(name).__module__.startswith("timm.")]


def tables() -> dict[str, str]:
    """The tables by name."""
    from visattn.models.swap.records import RECORDS

    models = json.loads(RESULT.read_text(encoding="utf-8"))["models"]
    counts = Counter(kind for found in models.values() if not found.startswith("(") for kind in found.split(", "))
    swapped = ["| class of timm | models | how many |", "| --- | --- | --- |"]
    for name in sorted(RECORDS, key=lambda name: -counts[name]):
        swapped.append(f"| `{name.removeprefix('timm.')}` | {RECORDS[name].models} | {counts[name]} |")
    reasons = Counter(why for found in models.values() if found.startswith("(") for why in found[1:-1].split("; "))
    refused = ["| why | models |", "| --- | --- |", *(f"| {why} | {n} |" for why, n in reasons.most_common())]
    return {"timm-swapped": "\n".join(swapped), "timm-refused": "\n".join(refused), "timm-count": count(models)}


def count(models: dict[str, str]) -> str:
    """How many models there are of each kind, in a sentence."""
    refused = sum(found.startswith("(") for found in models.values())
    without = sum(not found for found in models.values())
    swapped = len(models) - refused - without
    return (
        f"Of timm's {len(models):,} models {swapped} can be swapped, {refused} attend in a way that is refused, and "
        f"{without} have no attention."
    )


def render(page: str) -> str:
    """The page with its tables as they are now."""
    for name, rows in tables().items():
        page = with_table(page, name, rows)
    return page


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--look", action="store_true", help="build every model of timm, which takes some minutes")
    if parser.parse_args(arguments).look:
        write_json(RESULT, look())
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
