"""Patches the vision towers of models of transformers; the adapter of `visattn.apply`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from visattn.clients.transformers.hooks import Begin, Enter, Finish, PassBy, between
from visattn.clients.transformers.interface import is_ours, name_for, stock
from visattn.clients.transformers.site import Site, TowerRun, run_stock
from visattn.clients.transformers.swaps import swapped_class
from visattn.clients.transformers.towers import Assigned, Tower, check_bias, check_forwards, check_free, find_towers
from visattn.copies import Hooks, copy_as_is, copy_as_stock
from visattn.dims import check_dims
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Dense
from visattn.report import SiteReport
from visattn.request import Request
from visattn.runtime.forward import Where
from visattn.runtime.place import Samples
from visattn.runtime.runner import Runner
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[PatchedTower]:
    """Patch the vision towers of a model of transformers.

    Raises:
        ValueError: If there is none that visattn knows, the pattern does not fit, or it is patched already.
    """
    model = getattr(target, "_orig_mod", target)
    if not isinstance(model, nn.Module):
        # A pipeline of transformers has one.
        model = getattr(target, "model", None)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"cannot apply to a {type(target).__name__} of transformers: pass a model or a pipeline")
    if stepped := request.schedule.counted:
        raise ValueError(f"{stepped} counts denoising steps, and {name} has none: use dense_layers or layers")
    towers = find_towers(model, name)
    check_free(towers, name)
    for tower in towers:
        check_forwards(tower)
    sites = [site for tower in towers for site in tower.sites]
    patterns = request.schedule.assign_stepless([site.name for site in sites], name)
    precise = request.schedule.precisions([site.name for site in sites], name)
    precisions = {site.name.path: precision for site, precision in zip(sites, precise, strict=True)}
    given = {site.name.path: pattern for site, pattern in zip(sites, patterns, strict=True) if pattern is not None}
    patched: list[PatchedTower] = []
    for tower in towers:
        own = [(site, given[site.name.path]) for site in tower.sites if site.name.path in given]
        for _, pattern in own:
            check_bias(pattern, tower, name)
            check_dims(pattern, tower.dims if request.layout is None else request.layout.dims, name)
    for tower in towers:
        own = [(site, given[site.name.path]) for site in tower.sites if site.name.path in given]
        try:
            if own:
                patched.append(PatchedTower(model, name, tower, own, precisions, request))
        except ValueError:
            for done in patched:
                done.remove()
            raise
    return patched


class PatchedTower:
    """One patched tower: its run, its sites, its hooks and the implementation that it had."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        tower: Tower,
        sites: Assigned,
        precisions: Mapping[str, str | None],
        request: Request,
    ) -> None:
        self._request, self._sites = request, sites
        self._run = TowerRun(name, request.schedule, request.strict, always=request.always)
        self._run.sparse_sites = [site.name.path for site, pattern in sites if not isinstance(pattern, Dense)]
        self._mixin = tower.record.swap
        # Swapped modules call no implementation.
        configs = [] if self._mixin else [site.module.config for site, _ in sites]
        self._configs = {id(config): config for config in configs}
        self._previous = {key: config._attn_implementation for key, config in self._configs.items()}
        # What can refuse comes before anything is changed.
        modules = [(site.module, pattern) for site, pattern in sites]
        owns = [make_parameters(m, m, p, tower.dims) if p.learnable else None for m, p in modules]
        attends = [_no_stock if self._mixin else stock(m.config._attn_implementation, m) for m, _ in modules]
        self._learnables = [
            Learnable(name, site.name.path, pattern, own)
            for (site, pattern), own in zip(sites, owns, strict=True)
            if own is not None
        ]
        self._hooks = Hooks()
        self._hooks.before(tower.anchor, Begin(self._run, tower.anchor, _reader(tower, request)), with_kwargs=True)
        self._hooks.after(tower.module, Finish(self._run), always=True)
        for path in between(tower.path, [site.name.path for site, _ in sites]):
            self._hooks.before(model.get_submodule(path), PassBy(self._run), with_kwargs=True)
        for (site, pattern), own, attend in zip(sites, owns, attends, strict=True):
            module, path = site.module, site.name.path
            runner = Runner(self._run, pattern, request.backend, run_stock, own, precisions[path])
            module.visattn_site = Site(self._run, path, runner, attend)
            enter = Enter(self._run, module.visattn_site, module, tower.record.told)
            self._hooks.before(module, enter, with_kwargs=True)
        self._classes = self._swap()
        for module in {id(m): m for m in [*self._hooks.modules, *(site.module for site, _ in sites)]}.values():
            copy_as_stock(module, ("visattn_site",), self._classes)
        for key in self._configs:
            self._take(key, self._previous[key])
        self._run.strays, self._run.repair = self._strays, self._repair

    def _take(self, key: int, previous: str | None) -> None:
        """Make a configuration name ours, which stands for the implementation that it had."""
        self._previous[key] = previous
        self._configs[key]._attn_implementation_internal = name_for(previous)

    def _strays(self) -> bool:
        """Whether somebody has set another implementation since."""
        return not all(is_ours(config._attn_implementation) for config in self._configs.values())

    def _repair(self) -> None:
        """Let what somebody has set since compute the calls that run no pattern, and put ours in its place."""
        for key, config in self._configs.items():
            theirs = config._attn_implementation
            if is_ours(theirs):
                continue
            warnings.warn(
                f"{self._run.name}: the attention implementation {theirs!r} was set after apply(): it now computes the "
                "calls that are dense, and the pattern is installed again",
                stacklevel=6,
            )
            self._take(key, theirs)
            for site, _ in self._sites:
                if id(site.module.config) == key:
                    site.module.visattn_site.stock = stock(theirs, site.module)

    def _swap(self) -> dict[type, type]:
        """Put the mixin before the classes of the modules that need one: what each class was."""
        classes: dict[type, type] = {}
        if self._mixin is None:
            return classes
        for site, _ in self._sites:
            kind = type(site.module)
            if not issubclass(kind, self._mixin):
                site.module.__class__ = swapped_class(kind, self._mixin)
                classes[type(site.module)] = kind
        return classes

    def remove(self) -> None:
        """See `visattn.request.Patch`. An implementation that someone else has set since comes back in its place."""
        for key, config in self._configs.items():
            if is_ours(config._attn_implementation):
                config._attn_implementation_internal = self._previous[key]
        self._configs.clear()
        for site, _ in self._sites:
            copy_as_is(site.module)
            site.module.__dict__.pop("visattn_site", None)
            # A class that someone else has set since stays, and does as the stock class.
            site.module.__class__ = self._classes.get(type(site.module), type(site.module))
        self._hooks.remove()

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.request.Patch`. Calls inside compiled code are not counted."""
        patterns = {site.name.path: pattern for site, pattern in self._sites}
        return self._run.reports(patterns, self._request.backend)

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.request.Patch`."""
        return self._learnables

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.request.Patch`."""
        self._run.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.request.Patch`; these models have no steps and `dense_steps` is refused."""


def _no_stock(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a swapped module runs its own forward")


def _reader(tower: Tower, request: Request) -> Any:
    """Where the tokens of a forward sit, from the arguments of its anchor."""
    record, config = tower.record, tower.config
    if request.layout is not None:
        fixed: Where = Samples((request.layout,))
        return lambda args: fixed
    prefix, suffix = record.counts(config)
    return functools.partial(_read, record.reader, config, prefix, suffix)


def _read(reader: Any, config: Any, prefix: int, suffix: int, args: Any) -> Where:
    return reader(config, args, prefix, suffix)
