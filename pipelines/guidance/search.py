"""Which heads to perturb: a greedy search that goes on where it was stopped.

After HeadHunter (https://arxiv.org/abs/2506.10978), of which only the abstract was known here: it picks heads round by
round, by what the user wants to see more of. Rounds, halving, budget and the rule that ends it are ours. Each round
adds to the chosen heads those with which pictures score best. Candidates are compared on one seed first, the better
ones on more, and a head is added only where pictures of the same prompts and seeds gain more than the standard error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visattn.environment import cpu_name
from visattn.files import as_path
from visattn.given import real, said, several
from visattn.handle import Handle, apply, check_handle
from visattn.patterns.values import whole_number
from visattn.pipelines.guidance.handle import guide
from visattn.pipelines.guidance.perturbing import check_options, chosen_sites, perturbation_of
from visattn.pipelines.guidance.trials import Head, Trials
from visattn.pipelines.patch.install import PatchedModel
from visattn.selectors import Layers

Objective = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
Heads = tuple[Head, ...]


class FoundHeads(NamedTuple):
    """What a search found.

    Attributes:
        heads: Heads by layer, as `guide` takes them; empty if none helps.
        gain: What pictures score more with them than without guidance, over all rounds.
        rounds: Of each round: what was added, its gain and the standard error of that.
        finished: Whether the search ended by itself rather than by `seconds`.
    """

    heads: dict[str, list[int]]
    gain: float
    rounds: list[dict[str, Any]]
    finished: bool


class _OutOfTime(Exception):
    """The time is over."""


def find_heads(
    pipe: Any,
    prompts: Sequence[str],
    objective: Objective,
    out: Path,
    *,
    scale: float = 3.0,
    strength: float = 1.0,
    perturb: str = "identity",
    layers: Layers = None,
    candidates: Sequence[Head] | None = None,
    seeds: Sequence[int] = (1, 4, 16),
    add: int = 1,
    most: int = 8,
    seconds: float = math.inf,
    handle: Handle | None = None,
    **options: Any,
) -> FoundHeads:
    """Search the heads whose perturbation, kept away from, gives pictures that score best; see the module.

    Args:
        pipe: A diffusers pipeline.
        prompts: What is drawn, all in one batch.
        objective: Gives scores [N] of pictures [N, 3, H, W] with values 0 to 1, and their prompts; more is better.
        out: File of all scores, a JSON object a line. The same search goes on with what is there.
        scale: As in `guide`.
        strength: As in `guide`.
        perturb: As in `guide`.
        layers: Whose heads are candidates, None for all.
        candidates: (layer, head) pairs instead of all heads of `layers`.
        seeds: How many seeds the candidates of each stage of a round have, more in each.
        add: How many heads a round adds at most.
        most: How many are chosen at most.
        seconds: Draws nothing more after so long; the search can go on later.
        handle: That of a pipeline which is patched already, for sparse guidance.
        options: Given to the pipeline for each picture: size, steps, guidance scale.

    Returns:
        The heads.

    Raises:
        ValueError: If an option is out of its range, or the file has scores of another search.
    """
    prompts, seeds = _several_of(prompts, seeds)
    add, most = whole_number(add, "add", 1), whole_number(most, "most", 1)
    if candidates is not None:
        candidates = [_head(each) for each in several(candidates, "candidates", "(layer, head) pairs")]
    _check(pipe, objective, seconds, handle)
    out = as_path(out)
    check_options(scale, strength, 0.0, 1.0, None, None)
    perturbation_of(perturb)
    given = {"prompts": prompts, "scale": scale, "strength": strength, "perturb": perturb, "options": options}
    given |= {"objective": getattr(objective, "__name__", str(objective)), "model": type(pipe).__name__}
    # Noise and rounding are those of a device and a version: scores of others do not compare.
    device = torch.device(pipe.device)
    given |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()}
    given |= {"torch": torch.__version__}
    ends = time.monotonic() + seconds
    with apply(pipe, "dense") if handle is None else nullcontext(handle) as applied:
        heads = all_heads(pipe, applied, layers) if candidates is None else candidates
        with Trials(out, given) as trials:

            def scores(chosen: Heads, count: int) -> torch.Tensor:
                """Scores [count, prompts] of the first seeds with some heads."""
                rows = []
                for seed in range(count):
                    found = trials.get(chosen, seed)
                    if found is None:
                        if time.monotonic() > ends:
                            raise _OutOfTime
                        pictures = _draw(pipe, prompts, seed, chosen, (scale, perturb, strength), applied, options)
                        found = objective(pictures, prompts).double().flatten().tolist()
                        if len(found) != len(prompts):
                            raise ValueError(f"the objective gave {len(found)} scores of {len(prompts)} pictures")
                        trials.put(chosen, seed, found)
                    rows.append(found)
                return torch.tensor(rows, dtype=torch.float64, device="cpu")

            return _search(heads, scores, tuple(seeds), add, most)


def _several_of(prompts: Any, seeds: Any) -> tuple[list[str], list[int]]:
    """Prompts, and how many seeds each stage has.

    Raises:
        ValueError: If they are none, or too few to compare.
    """
    prompts, seeds = several(prompts, "prompts", "texts"), several(seeds, "seeds", "whole numbers that grow")
    seeds = [whole_number(each, "seeds", 1) for each in seeds]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts={said(prompts)} must be a list of texts, at least one")
    if seeds != sorted(set(seeds)) or not seeds:
        raise ValueError(f"seeds={seeds} must grow from stage to stage, like [1, 4, 16]")
    if len(prompts) * seeds[-1] < 2:
        raise ValueError("one picture has no standard error: pass more prompts or seeds")
    return prompts, seeds


def _check(pipe: Any, objective: Any, seconds: Any, handle: Any) -> None:
    """Raise a ValueError for what cannot be searched with."""
    real(seconds, "seconds", "a number of at least 0", lambda x: x >= 0)
    if not callable(objective):
        raise ValueError(f"objective={said(objective)} must be a function of pictures and prompts that gives scores")
    if not callable(pipe) or not hasattr(pipe, "device"):
        raise ValueError(f"pipe={said(pipe)} must be a diffusers pipeline")
    check_handle(handle)


def _head(given: Any) -> Head:
    """A candidate.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], str):
        raise ValueError(f"candidates has {said(given)}, which is no (layer, head) pair like ('mid_block', 0)")
    return given[0], whole_number(given[1], "the head of a candidate", 0)


def sharpness(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """An objective: the mean square of the Laplacian of the brightness [N]."""
    grey = pictures.float().mean(1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * inner).square().mean((1, 2))


def palette(examples: torch.Tensor) -> Objective:
    """An objective: how near mean and spread of the colours are to those of example pictures [M, 3, H, W]."""

    def statistics(pictures: torch.Tensor) -> torch.Tensor:
        colours = pictures.float().flatten(2)
        return torch.cat([colours.mean(2), colours.std(2)], 1)

    wanted = statistics(examples).mean(0)

    def like_examples(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -(statistics(pictures) - wanted.to(pictures.device)).norm(dim=1)

    return like_examples


def by_layer(heads: Sequence[Head]) -> dict[str, list[int]]:
    """Heads by layer, as `guide` takes them."""
    found: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def _search(
    heads: Sequence[Head],
    scores: Callable[[Heads, int], torch.Tensor],
    seeds: tuple[int, ...],
    add: int,
    most: int,
) -> FoundHeads:
    """The rounds."""
    chosen: Heads = ()
    rounds: list[dict[str, Any]] = []
    finished = True
    try:
        while len(chosen) < most:
            found = _round(chosen, heads, scores, seeds, min(add, most - len(chosen)))
            if not found["added"]:
                break
            rounds.append(found)
            chosen = (*chosen, *found["added"])
    except _OutOfTime:
        finished = False
    return FoundHeads(by_layer(chosen), sum(each["gain"] for each in rounds), rounds, finished)


def _round(
    chosen: Heads,
    heads: Sequence[Head],
    scores: Callable[[Heads, int], torch.Tensor],
    seeds: tuple[int, ...],
    add: int,
) -> dict[str, Any]:
    """What one round adds, with the gain of all of it together."""
    left = [head for head in heads if head not in chosen]
    for count, more in zip(seeds, (*seeds[1:], 0), strict=True):
        means = {head: float(scores((*chosen, head), count).mean()) for head in left}
        left.sort(key=lambda head: -means[head])
        if more:
            # As many pictures again in the next stage.
            left = left[: max(add, math.ceil(len(left) * count / more))]
    before, added = scores(chosen, seeds[-1]), []
    for head in left[:add]:
        gain, error = _gain(scores((*chosen, head), seeds[-1]), before)
        if gain > error:
            added.append(head)
    if not added:
        return {"added": []}
    gain, error = _gain(scores((*chosen, *added), seeds[-1]), before)
    return {"added": added, "gain": gain, "error": error} if gain > error else {"added": []}


def _gain(after: torch.Tensor, before: torch.Tensor) -> tuple[float, float]:
    """Mean difference of the same prompts and seeds, and its standard error."""
    difference = (after - before).flatten()
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def _draw(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    chosen: Heads,
    perturbation: tuple[float, str, float],
    handle: Handle,
    options: dict[str, Any],
) -> torch.Tensor:
    """Pictures of all prompts with the noise of a seed."""
    scale, perturb, strength = perturbation
    heads = by_layer(chosen)
    noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    guided = guide(pipe, scale, perturb, heads=heads, strength=strength, handle=handle) if heads else nullcontext()
    with guided, torch.no_grad():
        return pipe(prompt=list(prompts), generator=noise, output_type="pt", **options)[0]


def all_heads(pipe: Any, handle: Handle, layers: Layers) -> list[Head]:
    """Every head of some layers."""
    found: dict[str, int] = {}
    for patched in handle.patches:
        if isinstance(patched, PatchedModel):
            for site, _ in chosen_sites(patched, "0-" if layers is None else layers, None):
                heads = getattr(site.module, "heads", None) or getattr(site.module, "num_heads", None)
                if not isinstance(heads, int):
                    raise ValueError(
                        f"{site.name.path} of {type(pipe).__name__} does not tell its number of heads: pass candidates="
                    )
                found[site.name.layer] = min(heads, found.get(site.name.layer, heads))
    return [(layer, head) for layer, heads in found.items() for head in range(heads)]
