"""What `visattn maps` computes: from a model or a file of recorded calls to what its page shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visattn.cli.maps_models import Subject
    from visattn.maps.shown import Shown
    from visattn.recorded import Recorded


def of_file(path: Path, step: int, chosen: dict[str, Any]) -> Shown:
    """A file of recorded calls: one step of it."""
    from visattn.recorded import load_recorded
    from visattn.schedule import selectors_of
    from visattn.selectors import SiteName, pick

    calls, about = load_recorded(path)
    known = sorted({call.step for call in calls if call.step is not None})
    here = [call for call in calls if call.call == 0 and call.step in (step, None)]
    if not here:
        raise ValueError(f"{path} has no step {step}: pass --step {' or '.join(map(str, known))}")
    if chosen["layers"] is not None:
        names = [SiteName(call.site, call.site) for call in here]
        wanted = pick(selectors_of(chosen["layers"]), names, [name.layer for name in names], str(path))
        here = [call for i, call in enumerate(here) if i in wanted]
    said = f"{about.get('model', path.name)}, step {step} of recorded calls"
    return _shown(f"Attention of {about.get('model', path.name)}", said, here, chosen, {}, "", None)


def of_model(subject: Subject, chosen: dict[str, Any], tell: Callable[[str], None]) -> Shown:
    """One forward of a model; `tell` hears what is being done."""
    from visattn import maps

    options = {"layers": chosen["layers"]}
    tell("looking at its attention")
    calls = maps.calls(subject.model, subject.forward, **options)
    check_query(calls, chosen["query"])
    found: dict[str, Any] = {}
    pruned: dict[str, maps.Pruned] = {}
    words = ""
    if chosen["importance"] != "none":
        tell("importance of heads")
    if chosen["importance"] == "gradient":
        found = maps.gradient(subject.model, subject.forward, classes=subject.classes, **options)
        words = "how the logarithm of the predicted class' probability" if subject.classes else "how far the output"
        words += " moves with a gate on the head, to first order"
    elif chosen["importance"] == "pruning":
        pruned = maps.pruning(subject.model, subject.forward, classes=subject.classes, **options)
        found = {site: each.change if each.divergence is None else each.divergence for site, each in pruned.items()}
        words = "relative change of the output" if not subject.classes else "divergence of the class probabilities"
        words += " when the head is zeroed"
    name = type(subject.model).__name__
    tell(f"maps of {len(calls)} modules")
    shown = _shown(f"Attention of {name}", subject.about, calls, chosen, found, words, subject)
    return replace(shown, pruned={site: each.to_dict() for site, each in pruned.items()})


def check_query(calls: list[Recorded], query: Any) -> tuple[int, tuple[int, ...]]:
    """The token of a query on the largest grid of a model, and that grid.

    Raises:
        ValueError: If it is not there; before anything is computed.
    """
    from visattn.maps.look import query_token

    grids = [call.layout.grid for call in calls]
    largest = max(grids, key=lambda grid: (len(grid), grid))
    return query_token(query, calls[grids.index(largest)].layout, largest), largest


def _shown(
    title: str,
    about: str,
    calls: list[Recorded],
    chosen: dict[str, Any],
    importance: dict[str, Any],
    words: str,
    subject: Subject | None,
) -> Shown:
    from visattn import maps
    from visattn.maps.heat import plane
    from visattn.maps.look import default_patterns, details, rolled_out
    from visattn.maps.shown import Shown

    query, sample = chosen["query"], 0 if subject is None else subject.sample
    token, largest = check_query(calls, query)
    patterns = chosen["pattern"] or default_patterns(largest)
    found = maps.overview(calls, patterns, importance=importance)
    rows_of = chosen["pattern"][0] if chosen["pattern"] else None
    of_class = query == "cls" or (query is None and subject is not None and subject.images is not None)
    whose = "the class token" if query == "cls" else f"query {','.join(map(str, query or [n // 2 for n in largest]))}"
    try:
        rolled: Any = plane(rolled_out(calls, None if of_class else token, sample), largest)
        first = "the class token" if calls[0].layout.prefix else "the mean token"
        said = f"rollout of {first if of_class else whose} through {len(calls)} modules"
    except ValueError as error:
        rolled, said = None, f"No rollout: {error}"
    return Shown(
        title,
        about,
        found,
        details(calls, query, rows_of, sample),
        whose,
        rows_of or "",
        chosen["mass"],
        words,
        None if subject is None else (subject.picture, subject.name),
        (rolled, said),
        _scores(subject, calls),
    )


def _scores(subject: Subject | None, calls: list[Recorded]) -> list[str]:
    """How well rollout shows what a classifier needs."""
    from visattn.maps.look import rolled_out, scored

    if subject is None or subject.scores is None or len({call.layout for call in calls}) > 1:
        return []
    import torch

    layout = calls[0].layout
    if layout.dims != 2:
        return []
    maps = torch.stack([rolled_out(calls, None, i) for i in range(subject.images.shape[0])])
    grid: Any = layout.grid
    return [
        f"Rollout as a saliency map, its largest {each['share']:.0%}: average drop {each['average_drop']:.1%}, "
        f"more confident in {each['confidence_gain']:.0%} of the images."
        for each in scored(subject.scores, subject.images, maps, grid)
    ]
