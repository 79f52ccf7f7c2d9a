"""Swaps the attention of timm models; the adapter of `visattn.apply`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from visattn.copies import Hooks, copy_as_is, copy_as_stock
from visattn.dispatch import choose
from visattn.layout import Layout
from visattn.models.swap.hooks import (
    Begin,
    CountForeign,
    Fail,
    Finish,
    Follow,
    PassBy,
    RefuseDroppedPatches,
    Resume,
)
from visattn.models.swap.places import Places
from visattn.models.swap.records import check_fit
from visattn.models.swap.runtime import Swapped, SwapRun
from visattn.models.swap.sites import Site, find_sites
from visattn.models.swap.sources import Source, source_of
from visattn.outside import Outside
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Dense
from visattn.report import SiteReport
from visattn.request import Request
from visattn.schedule import Given
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[SwappedModel]:
    """Swap the attention of a timm model.

    Raises:
        ValueError: If the model has no attention that visattn knows, the pattern does not fit it, or it is swapped
            already.
    """
    model = getattr(target, "_orig_mod", target)
    schedule = request.schedule
    if stepped := schedule.counted:
        raise ValueError(f"{stepped} counts denoising steps, and a timm model has none: use dense_layers or layers")
    if schedule.keeps is not None:
        raise ValueError(
            f"{schedule.keeps} keeps something for later denoising steps, and a timm model has none: "
            f"{schedule.keeps.stepless}"
        )
    return [SwappedModel(model, request)]


class SwappedModel:
    """One swapped model: its modules, what they were before, and the hooks that follow the image size."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._name, self._request = type(model).__name__, request
        found = find_sites(model, self._name)
        names = [site.name for site in found]
        patterns = request.schedule.assign_stepless(names, self._name, own_grid(model, request.layout))
        precisions = dict(
            zip([name.path for name in names], request.schedule.precisions(names, self._name), strict=True)
        )
        self._sites = [
            site.given(pattern) for site, pattern in zip(found, patterns, strict=True) if pattern is not None
        ]
        swapped = [site for site in self._sites if not site.foreign]
        for site in swapped:
            check_fit(site.module, site.pattern, self._name)
        self._run = SwapRun(self._name, request.schedule, request.strict, always=request.always)
        self._run.sparse_sites = [site.name.path for site in swapped if not isinstance(site.pattern, Dense)]
        self._places: dict[int, tuple[Places, Source | None]] = {}
        self._learnables: list[Learnable] = []
        places = [self._places_of(model, site) for site in swapped]
        # What can refuse comes before anything is changed.
        owns = [make_parameters(s.module, s.module, s.pattern, 2) if s.pattern.learnable else None for s in swapped]
        orders = [s.record.order(model, s.name.path) if s.record.order is not None else None for s in swapped]
        for site, on, own, order in zip(swapped, places, owns, orders, strict=True):
            if own is not None:
                self._learnables.append(Learnable(self._name, site.name.path, site.pattern, own))
            arguments = site.name.path, site.pattern, request.backend, own, site.attention, order
            site.swap(Swapped(self._run, on, *arguments, precision=precisions[site.name.path]))
        self._hooks = Hooks()
        self._add_hooks(model)

    def _places_of(self, model: nn.Module, site: Site) -> Places:
        """Where the tokens sit of a module and of all that are on the same grid."""
        source = source_of(model, site.name.path) if site.record.tokens else None
        if site.record.tokens and source is None and self._request.layout is None:
            raise ValueError(
                f"nothing in {self._name} tells where the tokens of {site.name.path} sit: pass layout=Layout(...), and "
                "layers=... that are on that grid"
            )
        key = id(None if source is None else source.module)
        if key not in self._places:
            prefix = 0 if source is None else source.prefix
            self._places[key] = Places(self._name, self._request.layout, prefix), source
        return self._places[key][0]

    def _add_hooks(self, model: nn.Module) -> None:
        hooks = self._hooks
        # On the module that drops them: forward_features and forward_intermediates pass the model's own hooks by.
        for module in model.modules():
            drop = getattr(module, "patch_drop", None)
            if isinstance(drop, nn.Module):
                hooks.before(drop, RefuseDroppedPatches())
        for places, source in self._places.values():
            if source is not None:
                self._follow(model, places, source)
        for site in self._sites:
            if site.foreign:
                reason = "" if isinstance(site.pattern, Dense) else site.foreign
                hooks.before(site.module, CountForeign(self._run, site.name.path, reason))
        hooks.before(model, Begin(self._run))
        hooks.after(model, Finish(self._run, [places for places, _ in self._places.values()]), always=True)
        classes = {type(site.module): site.kind for site in self._sites if type(site.module) is not site.kind}
        for module in [*hooks.modules, *(site.module for site in self._sites)]:
            copy_as_stock(module, ("visattn_site",), classes)

    def _follow(self, model: nn.Module, places: Places, source: Source) -> None:
        """Let the modules on a grid know the grid that its source tells."""
        own = [site for site in self._sites if site.places is places]
        self._hooks.after(source.module, Follow(places, source), with_kwargs=True)
        self._hooks.after(source.module, Fail(places, told=False), always=True)
        way = _on_the_way(model, source.module, own)
        for path in way:
            # The model's own hooks do not tell: its features are asked for without a call of it.
            self._hooks.after(model.get_submodule(path), Fail(places), always=True)
            self._hooks.before(model.get_submodule(path), PassBy(places))
        if self._request.layout is None:
            places.outside = Outside(model, [*way, *(site.name.path for site in own)], places.bring)
        self._hooks.after(model, Resume(places))

    def remove(self) -> None:
        """See `visattn.request.Patch`. A class that someone else has set since stays, and does as the stock class."""
        for site in self._sites:
            copy_as_is(site.module)
            site.restore()
        self._hooks.remove()
        for places, _ in self._places.values():
            if places.outside is not None:
                places.outside.leave()

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.request.Patch`."""
        return self._learnables

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.request.Patch`."""
        self._run.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.request.Patch`; a timm model has no steps and `dense_steps` is refused."""

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.request.Patch`. Calls inside compiled code are not counted."""
        patterns: dict[str, Given] = {site.name.path: site.pattern for site in self._sites}
        found = self._run.reports(patterns, self._request.backend)
        return [self._named(site, report) for site, report in zip(self._sites, found, strict=True)]

    def _named(self, site: Site, found: SiteReport) -> SiteReport:
        """A report that names the engine also where a pattern covers the map."""
        if site.foreign or site.record.tokens or site.dense:
            return found
        # A block of Swin never runs its own windows for a pattern, even where that covers the grid.
        calls = []
        for call in found.calls:
            name = choose(call.problem, self._request.backend).name
            calls.append(replace(call, backend=name, why="with the position bias", refused={}))
        return replace(found, calls=tuple(calls))


def own_grid(model: nn.Module, layout: Layout | None = None) -> tuple[int, ...] | None:
    """Tokens per axis of the images that a model was made for, None if it does not say."""
    if layout is not None:
        return layout.grid
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else tuple(grid)


def _on_the_way(model: nn.Module, embed: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of the modules around those swapped on a grid, without those around the module that tells it as well."""
    named = dict(model.named_modules())
    paths = [site.name.path.split(".") for site in sites]
    ways = {".".join(path[:end]): None for path in paths for end in range(1, len(path))}
    around = {id(module) for module in named.values() if any(m is embed for m in module.modules())}
    return [way for way in ways if id(named[way]) not in around]
