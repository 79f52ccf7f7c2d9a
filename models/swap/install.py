"""Swaps the attention of timm models; the adapter of `visattn.apply`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from visattn.copies import copy_as_is, copy_as_stock
from visattn.dispatch import choose
from visattn.handle import Request
from visattn.models.swap.hooks import CountForeign, Follow, Hooks, Missed, PassBy, RefuseDroppedPatches, Resume
from visattn.models.swap.records import check_fit
from visattn.models.swap.runtime import Runtime, Swapped
from visattn.models.swap.sites import Site, find_sites
from visattn.outside import Outside
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Dense
from visattn.report import CallReport, SiteReport, density
from visattn.tally import Row
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[SwappedModel]:
    """Swap the attention of a timm model.

    Raises:
        ValueError: If the model has no attention that visattn knows, the pattern does not fit it, or it is swapped
            already.
    """
    model = getattr(target, "_orig_mod", target)
    schedule = request.schedule
    for name in ("dense_steps", "dense_last_steps"):
        if getattr(schedule, name):
            raise ValueError(f"{name} counts denoising steps, and a timm model has none: use dense_layers or layers")
    if schedule.keeps is not None:
        raise ValueError(
            f"{schedule.keeps} keeps its choice for later denoising steps, and a timm model has none: leave every out"
        )
    return [SwappedModel(model, request)]


class SwappedModel:
    """One swapped model: its modules, what they were before, and the hooks that follow the image size."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._name, self._request = type(model).__name__, request
        found = find_sites(model, self._name)
        patterns = request.schedule.assign([site.name for site in found], self._name)
        self._sites = [
            site.given(pattern) for site, pattern in zip(found, patterns, strict=True) if pattern is not None
        ]
        swapped = [site for site in self._sites if not site.foreign]
        for site in swapped:
            check_fit(site.module, site.pattern, self._name)
        host = next((m for m in model.modules() if hasattr(m, "patch_embed") or hasattr(m, "embeds")), model)
        embed = self._embedding(host, swapped)
        prefix = int(getattr(host, "num_prefix_tokens", 0))
        self.runtime = Runtime(self._name, request.backend, request.layout, prefix)
        self._learnables: list[Learnable] = []
        for site in swapped:
            own = make_parameters(site.module, site.module, site.pattern, 2) if site.pattern.learnable else None
            if own is not None:
                self._learnables.append(Learnable(self._name, site.name.path, site.pattern, own))
            site.swap(Swapped(self.runtime, site.name.path, site.pattern, own, site.attention))
        self._hooks = Hooks()
        self._add_hooks(model, host, embed)

    def _embedding(self, host: nn.Module, swapped: Sequence[Site]) -> nn.Module | None:
        """The patch embedding that tells where the tokens sit, None where nobody has to ask it."""
        if not any(site.record.tokens for site in swapped):
            return None
        embed = _embedding(host)
        if embed is None and self._request.layout is None:
            raise ValueError(
                f"{self._name} has no patch_embed that tells one grid of all its tokens: pass layout=Layout(...), and "
                "layers=... that are on that grid"
            )
        return embed

    def _add_hooks(self, model: nn.Module, host: Any, embed: nn.Module | None) -> None:
        hooks, runtime = self._hooks, self.runtime
        # On the module that drops them: forward_features and forward_intermediates pass the model's own hooks by.
        if isinstance(getattr(host, "patch_drop", None), nn.Module):
            hooks.before(host.patch_drop, RefuseDroppedPatches())
        if embed is not None:
            hooks.after(embed, Follow(runtime), with_kwargs=True)
            way = _on_the_way(model, embed, self._sites)
            for path in way:
                hooks.before(model.get_submodule(path), PassBy(runtime))
            if self._request.layout is None:
                own = [site.name.path for site in self._sites if not site.foreign and site.record.tokens]
                runtime.outside = Outside(model, [*way, *own], runtime.bring)
            hooks.after(model, Resume(runtime))
        for site in self._sites:
            if site.foreign and not isinstance(site.pattern, Dense):
                hooks.before(site.module, CountForeign(runtime, site.name.path, site.foreign))
        if self._request.strict:
            paths = [site.name.path for site in self._sites]
            hooks.before(model, Missed(runtime, paths))
            hooks.after(model, Missed(runtime, paths, True))
        classes = {type(site.module): site.kind for site in self._sites if type(site.module) is not site.kind}
        for module in [*hooks.modules, *(site.module for site in self._sites)]:
            copy_as_stock(module, ("visattn_site",), classes)

    def remove(self) -> None:
        """See `visattn.handle.Patch`. A class that someone else has set since stays, and does as the stock class."""
        for site in self._sites:
            copy_as_is(site.module)
            site.restore()
        self._hooks.remove()
        if self.runtime.outside is not None:
            self.runtime.outside.leave()

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.handle.Patch`."""
        return self._learnables

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.handle.Patch`."""
        self.runtime.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.handle.Patch`; a timm model has no steps and `dense_steps` is refused."""

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.handle.Patch`. Calls inside compiled code are not counted."""
        rows = self.runtime.tally.rows()
        return [self._report(site, rows.get(site.name.path, Row())) for site in self._sites]

    def _report(self, site: Site, row: Row) -> SiteReport:
        path, pattern = site.name.path, site.pattern
        found = SiteReport.of(self._name, path, pattern, self._request.backend, row)
        if site.foreign or site.record.tokens:
            return found
        # A block of Swin never runs its own windows for a pattern, even where that covers the grid.
        calls = []
        for problem, hits in row.hits.most_common():
            name = choose(problem, self._request.backend).name
            calls.append(CallReport(problem, hits, name, "with the position bias", density(problem)))
        return replace(found, calls=tuple(calls))


def _embedding(host: Any) -> nn.Module | None:
    """The patch embedding of a model whose tokens all are of one grid, None if it has none of that kind."""
    for name in ("embeds", "patch_embed"):
        embed = getattr(host, name, None)
        # CrossViT has a list of two, PiT one whose grid the next stages pool.
        if hasattr(embed, "dynamic_feat_size"):
            return embed
    return None


def _on_the_way(model: nn.Module, embed: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Paths of the modules around those swapped on sequences, without those around the embedding as well."""
    named = dict(model.named_modules())
    paths = [site.name.path.split(".") for site in sites if not site.foreign and site.record.tokens]
    ways = {".".join(path[:end]): None for path in paths for end in range(1, len(path))}
    around = {id(module) for module in named.values() if any(m is embed for m in module.modules())}
    return [way for way in ways if id(named[way]) not in around]
