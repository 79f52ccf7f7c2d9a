"""Patches the attention of diffusers models; the adapter of `visattn.apply`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence, Set
from typing import Any

import torch

from visattn.parameters import Learnable
from visattn.patterns import Dense, Pattern
from visattn.pipelines.patch import bare, targets, telling
from visattn.pipelines.patch.hooks import Begin, Hooks
from visattn.pipelines.patch.processors import Processors
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.schedulers import SchedulerSteps
from visattn.pipelines.patch.sharding import Sharding
from visattn.pipelines.patch.sites import find_sites
from visattn.pipelines.patch.steps import ContextSteps
from visattn.pipelines.patch.targets import Target
from visattn.report import SiteReport
from visattn.request import Request
from visattn.runtime.run import Step
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[PatchedModel]:
    """Patch a diffusers model, or every denoising model of a pipeline with its ControlNets.

    Raises:
        ValueError: If there is nothing to patch, the pattern does not fit, or something is patched already.
    """
    chosen = targets.find(target, request)
    patched: list[PatchedModel] = []
    pipeline = None if isinstance(target, torch.nn.Module) else target
    scheduler = SchedulerSteps(pipeline, {one.name: one.model for one in chosen}, request.strict)
    try:
        for one in chosen:
            # A ControlNet can run layers that are its transformer's: these are patched there.
            taken = {id(site.module) for done in patched for site in done.sites}
            patched.append(PatchedModel(one, scheduler, taken))
    except ValueError:
        for done in patched:
            done.remove()
        scheduler.remove()
        raise
    return patched


def patched_model(model: torch.nn.Module) -> PatchedModel | None:
    """The patch that a model has, None without one."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, Begin):
            return hook.keep.patched
    return None


class PatchedModel:
    """One patched model: its run, its processors and its hooks.

    Attributes:
        model: The model.
        family: What is known about its kind.
        sites: Its attention modules.
        removed: Whether the patch was undone.
    """

    def __init__(self, target: Target, scheduler: SchedulerSteps, taken: Set[int]) -> None:
        name, model, family, request = target
        self.model, self.family, self.removed = model, family, False
        schedule, layouts = request.schedule, request.layouts
        dims = layouts[0].dims if layouts else family.dims
        self.sites = find_sites(model, family, schedule, name, dims, taken, request.parallel is not None)
        self._request, self._scheduler = request, scheduler
        self._context = ContextSteps(model) if schedule.needs_steps and hasattr(model, "cache_context") else None
        said = [] if self._context is None else [self._context.now]
        # A pipeline that is running knows best; one that is not tells what its scheduler did last.
        sources = [functools.partial(scheduler.running, weakref.ref(model)), *said, scheduler.now]
        self._run = DiffusersRun(name, family, model.config, schedule, layouts, request.strict, sources, request.always)
        self._run.token = scheduler.token
        if (context := self._context) is not None:
            self._run.called = lambda: context.name
        self._run.sparse_sites = [s.name.path for s in self.sites if not isinstance(s.pattern, Dense)]
        if any(pattern.remembers for pattern in schedule.patterns):
            self._run.paths = tuple(site.name.path for site in self.sites)
            telling.number(site.module for site in self.sites)
        if request.parallel is not None:
            self._run.sharding = Sharding(model, self._run, request.parallel, request.mesh)
        self._processors = Processors(model, self._run, self.sites, request.backend)
        self._hooks: Hooks | None = None
        try:
            self._processors.install()
        except ValueError:
            self.remove()
            raise
        self._hooks = hooks = Hooks(model, self._run, self.sites)
        self._run.patched = self
        if self._run.sharding is not None:
            # After the hook that reads where the tokens sit.
            self._run.sharding.install(model)
        self._run.check_sites = functools.partial(self._processors.repair, hooks.follow)

    @property
    def run(self) -> DiffusersRun:
        """What it knows while it runs."""
        return self._run

    def running_step(self) -> Step:
        """Step and number of steps of the pipeline that is calling the model; unknown where none is."""
        return self._scheduler.running(weakref.ref(self.model))

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.request.Patch`."""
        patterns = {site.name.path: site.pattern for site in self.sites}
        return self._run.reports(patterns, self._request.backend)

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.request.Patch`."""
        found = [(site.name.path, site.pattern, site.parameters) for site in self.sites]
        return [
            Learnable(self._run.name, path, pattern, p)
            for path, pattern, p in found
            if p is not None and isinstance(pattern, Pattern)
        ]

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.request.Patch`."""
        self._run.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.request.Patch`."""
        self._run.step = step, total

    def remove(self) -> None:
        """See `visattn.request.Patch`. A processor that someone else has set since stays."""
        self.removed = True
        if self._hooks is not None:
            self._hooks.remove()
        if self._run.sharding is not None:
            self._run.sharding.remove()
        self._processors.undo()
        telling.forget(site.module for site in self.sites)
        for site in self.sites:
            bare.take_processor(site.module)
        self._run.release()
        if self._context is not None:
            self._context.remove()
        self._scheduler.remove()
