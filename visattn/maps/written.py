"""The files of a page of maps: HTML, PNG, the numbers, and what `apply` and `tune` take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from visattn.canvas import Picture, column, text
from visattn.files import written_whole
from visattn.maps import heat
from visattn.maps.drawn import caught_table, head_table
from visattn.maps.overview import MASSES, Site
from visattn.maps.page import page
from visattn.maps.shown import Details, Shown, rollout_picture


def write(folder: Path, shown: Shown) -> list[Path]:
    """Write maps.html, its pictures as PNG, the numbers as JSON, and what `apply` and `tune` take.

    Returns:
        The files.
    """
    overview, made = shown.overview, []
    pictures: dict[str, Picture] = {"heads.png": head_table(overview)}
    if overview.patterns:
        pictures["caught.png"] = caught_table(overview)
    if overview.similarity is not None:
        pictures["similarity.png"] = heat.picture(heat.colors(overview.similarity.numpy(), 0, 1), 720)
    if shown.rollout[0] is not None:
        pictures["rollout.png"] = rollout_picture(shown)
    for i, site in enumerate(overview.sites):
        pictures |= {f"{name}-{i:03}.png": each for name, each in _strips(site, shown).items()}
    for name, each in pictures.items():
        with written_whole(folder / name) as temporary:
            each.save(temporary, "PNG", optimize=True)
        made.append(folder / name)
    texts = {"maps.html": page(shown), "maps.json": json.dumps(_numbers(shown), indent=1) + "\n"}
    if overview.patterns:
        texts["schedule.json"] = json.dumps(overview.schedule(shown.mass), indent=2) + "\n"
        texts["candidates.txt"] = "\n".join(overview.candidates([shown.mass, *MASSES])) + "\n"
    for name, words in texts.items():
        with written_whole(folder / name) as temporary:
            temporary.write_text(words, encoding="utf-8")
        made.append(folder / name)
    return made


def _numbers(shown: Shown) -> dict[str, Any]:
    found = {"title": shown.title, "about": shown.about, "query": shown.query, "importance": shown.importance}
    found |= {"notes": list(shown.notes), "mass": shown.mass, **shown.overview.to_dict()}
    return found | ({"pruned": dict(shown.pruned)} if shown.pruned else {})


def _strips(site: Site, shown: Shown) -> dict[str, Picture]:
    """The PNG files of one module."""
    found = shown.details.get(site.site, Details())
    made = {}
    if found.dense:
        parts = [text(f"{site.site}: row of {shown.query}", size=14), heat.strip(found.dense)]
        if found.sparse:
            apart = [s - d for s, d in zip(found.sparse, found.dense, strict=True)]
            most = max(float(np.nanmax(np.abs(each))) for each in apart)
            parts += [text(f"the same under {shown.pattern}", size=14), heat.strip(found.sparse)]
            parts += [text("the difference: red more, blue less", size=14), heat.strip(apart, most)]
        made["rows"] = column(parts, gap=6, margin=10)
    if found.read:
        name = text(f"{site.site}: who is read, by the mean of all queries", size=14)
        made["read"] = column([name, heat.strip(found.read)], gap=6, margin=10)
    if found.offsets:
        name = text(f"{site.site}: key position minus query position, the middle is 0", size=14)
        made["offsets"] = column([name, heat.strip(found.offsets)], gap=6, margin=10)
    return made
