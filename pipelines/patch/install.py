"""Patches the attention of diffusers models; the adapter of `visattn.apply`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from visattn.handle import Request
from visattn.parameters import Learnable
from visattn.patterns import Dense, MergingPattern, Pattern
from visattn.pipelines.families import find_family, known_classes
from visattn.pipelines.families.base import Family, Seen
from visattn.pipelines.patch.hooks import Hooks
from visattn.pipelines.patch.processors import Processors
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.schedulers import SchedulerSteps
from visattn.pipelines.patch.sites import find_sites
from visattn.pipelines.patch.steps import ContextSteps
from visattn.report import SiteReport
from visattn.schedule import check_dims
from visattn.watch import Watcher

# Names under which pipelines keep the models that denoise.
DENOISERS = ("transformer", "transformer_2", "unet", "prior")


def install(target: Any, request: Request) -> list[PatchedModel]:
    """Patch a diffusers model, or every denoising model of a pipeline.

    Raises:
        ValueError: If there is nothing to patch, the pattern does not fit, or something is patched already.
    """
    models = _models(target, request)
    chosen = [(name, model, _family(model, request)) for name, model in models.items()]
    for _, model, family in chosen:
        for pattern in request.schedule.patterns:
            dims = family.dims if request.layout is None else request.layout.dims
            check_dims(pattern, dims, type(model).__name__)
            if isinstance(pattern, MergingPattern):
                _check_merging(pattern, model, family, request)
    patched: list[PatchedModel] = []
    pipeline = None if isinstance(target, torch.nn.Module) else target
    scheduler = SchedulerSteps(pipeline, models, request.strict)
    try:
        for name, model, family in chosen:
            patched.append(PatchedModel(name, model, family, request, scheduler))
    except ValueError:
        for done in patched:
            done.remove()
        scheduler.remove()
        raise
    return patched


def _models(target: Any, request: Request) -> dict[str, torch.nn.Module]:
    """The models to patch by name: the target itself, or the denoisers of a pipeline."""
    if isinstance(target, torch.nn.Module):
        model = getattr(target, "_orig_mod", target)
        return {type(model).__name__: model}
    parts = {name: getattr(target, name, None) for name in DENOISERS}
    found = {n: getattr(m, "_orig_mod", m) for n, m in parts.items() if isinstance(m, torch.nn.Module)}
    if not found:
        raise ValueError(f"{type(target).__name__} has none of {', '.join(DENOISERS)}: apply to one of its models")
    known = {n: m for n, m in found.items() if find_family(m) is not None}
    return found if request.layout is not None else known or found


def _family(model: torch.nn.Module, request: Request) -> Family:
    family = find_family(model)
    if family is None and request.layout is not None:
        return Family(type(model).__name__, (), request.layout.dims, ("*",), lambda config, args: Seen())
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is a model class that visattn does not know: pass layout=Layout(grid, prefix=..., "
            f"suffix=...) to say where its tokens sit; known classes: {known_classes()}"
        )
    if family.nothing:
        raise ValueError(f"{type(model).__name__}: {family.nothing}")
    return family


def _check_merging(pattern: Pattern, model: torch.nn.Module, family: Family, request: Request) -> None:
    if not family.levels or request.layout is not None:
        raise ValueError(
            f"{pattern} merges tokens of a UNet (Stable Diffusion 1.5, 2.1, XL) before they are projected, and "
            f"{type(model).__name__} {'was given a layout' if family.levels else 'is none'}: use agent(agents=...) here"
        )
    if request.backend != "auto":
        raise ValueError(
            f"{pattern.name} runs attention of its own: pass backend='auto' instead of {request.backend!r}"
        )


class PatchedModel:
    """One patched model: its run, its processors and its hooks."""

    def __init__(
        self, name: str, model: torch.nn.Module, family: Family, request: Request, scheduler: SchedulerSteps
    ) -> None:
        schedule, layout = request.schedule, request.layout
        dims = family.dims if layout is None else layout.dims
        self.sites = find_sites(model, family, schedule, name, dims)
        self._request, self._scheduler = request, scheduler
        self._context = ContextSteps(model) if schedule.needs_steps and hasattr(model, "cache_context") else None
        said = [] if self._context is None else [self._context.now]
        # A pipeline that is running knows best; one that is not tells what its scheduler did last.
        sources = [functools.partial(scheduler.running, weakref.ref(model)), *said, scheduler.now]
        self._run = DiffusersRun(name, family, model.config, schedule, layout, request.strict, sources)
        self._run.sparse_sites = [s.name.path for s in self.sites if not isinstance(s.pattern, Dense)]
        self._processors = Processors(model, self._run, self.sites, request.backend)
        self._hooks: Hooks | None = None
        try:
            self._processors.install()
        except ValueError:
            self.remove()
            raise
        self._run.check_sites = self._processors.repair
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
        self._processors.undo()
        self._run.release()
        if self._context is not None:
            self._context.remove()
        self._scheduler.remove()
