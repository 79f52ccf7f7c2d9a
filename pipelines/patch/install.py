"""Patches the attention of diffusers models; the adapter of `visattn.apply`."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from visattn.handle import Request
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Dense, MergingPattern, Pattern
from visattn.pipelines.families.base import Family
from visattn.pipelines.patch import clones, dispatch, members, merging, numbering, targets
from visattn.pipelines.patch.group import Group
from visattn.pipelines.patch.hooks import Hooks
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.steps import ContextSteps, SchedulerSteps
from visattn.pipelines.patch.stock import Stock
from visattn.report import SiteReport
from visattn.schedule import SiteName
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[PatchedModel]:
    """Patch a diffusers model, or every denoising model of a pipeline with its ControlNets.

    Raises:
        ValueError: If there is nothing to patch, the pattern does not fit, or something is patched already.
    """
    chosen = targets.find(target, request)
    patched: list[PatchedModel] = []
    scheduler = SchedulerSteps(target) if hasattr(target, "scheduler") and request.schedule.needs_steps else None
    try:
        for one in chosen:
            # A ControlNet can run layers that are its transformer's: these are patched there.
            taken = {id(site.module) for done in patched for site in done.sites}
            patched.append(PatchedModel(one.name, one.model, one.family, one.request, scheduler, taken))
    except ValueError:
        for done in patched:
            done.remove()
        if scheduler is not None:
            scheduler.remove()
        raise
    return patched


@dataclass
class Site:
    """One attention module that is patched.

    Attributes:
        name: Its path and layer.
        module: The module.
        pattern: What it was given.
        original: The processor found there.
        installed: The processor there now.
        group: The group it calls.
        parameters: Learnable parameters of the pattern, None if it has none.
    """

    name: SiteName
    module: torch.nn.Module
    pattern: Pattern
    original: Any = None
    installed: Any = None
    group: Group | None = None
    parameters: torch.nn.ParameterDict | None = None

    @property
    def intact(self) -> bool:
        """Whether the module still calls its group."""
        if self.group is None or self.module.processor is not self.installed:
            return False
        if isinstance(self.pattern, MergingPattern) or not clones.is_dispatching(self.installed):
            return True
        return self.installed._attention_backend is members.member(self.group.number)


class PatchedModel:
    """One patched model: its run, its groups and what was there before."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        family: Family,
        request: Request,
        scheduler: SchedulerSteps | None,
        taken: Set[int] = frozenset(),
    ) -> None:
        found = [(site, module) for site, module in family.find_sites(model) if id(module) not in taken]
        if not found:
            raise ValueError(f"{type(model).__name__} has no attention modules at {', '.join(family.sites)}")
        patterns = request.schedule.assign([site for site, _ in found], type(model).__name__)
        pairs = zip(found, patterns, strict=True)
        self.sites = [Site(site, module, pattern) for (site, module), pattern in pairs if pattern is not None]
        for site in self.sites:
            if clones.is_patched(site.module.processor):
                raise ValueError(f"{name} is patched already: call remove() on its handle before apply()")
        dims = family.dims if request.layout is None else request.layout.dims
        for site in self.sites:
            if site.pattern.learnable:
                site.parameters = make_parameters(model, site.module, site.pattern, dims)
        self._model, self._request, self._scheduler = model, request, scheduler
        self._groups: dict[tuple[Pattern, Stock, str], Group] = {}
        steps = [scheduler.now] if scheduler is not None else []
        self._context = (
            ContextSteps(model) if request.schedule.needs_steps and hasattr(model, "cache_context") else None
        )
        if self._context is not None:
            steps.insert(0, self._context.now)
        schedule, layout = request.schedule, request.layout
        self._run = DiffusersRun(name, family, model.config, schedule, layout, request.strict, steps)
        self._run.sparse_sites = [s.name.path for s in self.sites if not isinstance(s.pattern, Dense)]
        self._hooks: Hooks | None = None
        try:
            self._install(self.sites)
        except ValueError:
            self.remove()
            raise
        self._run.check_sites = self._repair
        self._hooks = Hooks(model, self._run, [(site.module, site.name.path) for site in self.sites])

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.handle.Patch`."""
        patterns = {site.name.path: site.pattern for site in self.sites}
        return self._run.reports(patterns, self._request.backend)

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.handle.Patch`."""
        found = [(site.name.path, site.pattern, site.parameters) for site in self.sites]
        return [Learnable(self._run.name, path, pattern, p) for path, pattern, p in found if p is not None]

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.handle.Patch`."""
        self._run.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.handle.Patch`."""
        self._run.step = step, total

    def remove(self) -> None:
        """See `visattn.handle.Patch`. A processor that someone else has set since stays."""
        if self._hooks is not None:
            self._hooks.remove()
        for site in self.sites:
            if site.group is not None and site.module.processor is site.installed:
                merges = isinstance(site.pattern, MergingPattern)
                if clones.is_dispatching(site.installed) and site.intact and not merges:
                    site.installed._attention_backend = members.backend_named(site.group.stock.backend)
                site.module.processor = site.original
            site.group = None
        for group in self._groups.values():
            numbering.release(group.number, group)
        self._groups.clear()
        members.unregister_members()
        numbering.release(self._run.number, self._run)
        for source in (self._context, self._scheduler):
            if source is not None:
                source.remove()

    def _install(self, sites: Sequence[Site]) -> None:
        """Make the modules call their groups."""
        users = Counter(id(getattr(m, "processor", None)) for m in self._model.modules() if hasattr(m, "processor"))
        for site in sites:
            processor = site.module.processor
            site.original = processor
            site.group = group = self._group(site, clones.stock_of(processor))
            if isinstance(site.pattern, MergingPattern):
                site.installed = merging.clone(processor, group.number, self.sites.index(site))
            elif not clones.is_dispatching(processor):
                site.installed = clones.clone(processor, group.number)
            else:
                # A processor that serves other modules too must stay as it is.
                site.installed = copy.copy(processor) if users[id(processor)] > 1 else processor
                site.installed._attention_backend = members.member(group.number)
            site.module.processor = site.installed

    def _group(self, site: Site, stock: Stock) -> Group:
        pattern = site.pattern
        # Compiled code knows groups, not modules: one with parameters of its own needs a group of its own.
        key = pattern, stock, site.name.path if site.parameters is not None else ""
        if key not in self._groups:
            kind = merging.MergingGroup if isinstance(pattern, MergingPattern) else Group
            self._groups[key] = group = kind(self._run, pattern, self._request.backend, stock, site.parameters)
            if stock.dispatched:
                members.register_member(group.number, dispatch.dispatched)
        return self._groups[key]

    def _repair(self) -> None:
        """Patch modules again whose processor or backend was set by someone else after `apply`."""
        broken = [site for site in self.sites if not site.intact]
        if not broken:
            return
        warnings.warn(
            f"{self._run.name}: the attention processor or backend of {len(broken)} patched modules was set after "
            f"apply(): it now computes their dense calls, and the pattern is installed again",
            stacklevel=4,
        )
        self._install(broken)
