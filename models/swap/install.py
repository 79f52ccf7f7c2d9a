"""Swaps the attention of timm models; the adapter of `visattn.apply`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from visattn.dispatch import choose
from visattn.handle import Request
from visattn.models.swap.hooks import Follow, Missed, refuse_dropped_patches
from visattn.models.swap.records import RECORDS, check_fit, record_of, record_of_class, swapped_class
from visattn.models.swap.runtime import Runtime, Swapped
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Pattern
from visattn.report import CallReport, Row, SiteReport, density
from visattn.schedule import SiteName
from visattn.watch import Watcher


def install(target: Any, request: Request) -> list[SwappedModel]:
    """Swap the attention of a timm model.

    Raises:
        ValueError: If the model has no attention that visattn knows, the pattern does not fit it, or it is swapped
            already.
    """
    model = getattr(target, "_orig_mod", target)
    if request.schedule.dense_steps:
        raise ValueError("dense_steps counts denoising steps, and a timm model has none: use dense_layers or layers")
    return [SwappedModel(model, request)]


class SwappedModel:
    """One swapped model: its modules, what they were before, and the hooks that follow the image size."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._name, self._request = type(model).__name__, request
        found = _sites(model, self._name)
        patterns = request.schedule.assign([name for name, _ in found], self._name)
        chosen = [(n, m, p) for (n, m), p in zip(found, patterns, strict=True) if p is not None]
        for _, module, pattern in chosen:
            check_fit(module, pattern, self._name)
        host = next((m for m in model.modules() if hasattr(m, "patch_embed") or hasattr(m, "embeds")), model)
        tokens = any(record_of_class(type(module)).tokens for _, module, _ in chosen)
        embed = _embedding(host) if tokens else None
        if tokens and embed is None and request.layout is None:
            raise ValueError(
                f"{self._name} has no patch_embed that tells one grid of all its tokens: pass layout=Layout(...), and "
                "layers=... that are on that grid"
            )
        prefix = int(getattr(host, "num_prefix_tokens", 0))
        self.runtime = Runtime(self._name, request.backend, request.layout, prefix)
        self._sites: list[tuple[SiteName, nn.Module, Pattern, type]] = []
        self._learnables: list[Learnable] = []
        for name, module, pattern in chosen:
            record = record_of(module)
            assert record is not None
            self._sites.append((name, module, pattern, type(module)))
            own = make_parameters(module, module, pattern, 2) if pattern.learnable else None
            if own is not None:
                self._learnables.append(Learnable(self._name, name.path, pattern, own))
            module.visattn_site = Swapped(self.runtime, name.path, pattern, own)  # type: ignore[assignment]
            module.__class__ = swapped_class(type(module), record.mixin)
        # On the module that drops them: forward_features and forward_intermediates pass the model's own hooks by.
        dropping = getattr(host, "patch_drop", None)
        self._hooks: list[Any] = []
        if isinstance(dropping, nn.Module):
            self._hooks.append(dropping.register_forward_pre_hook(refuse_dropped_patches))
        if embed is not None:
            self._hooks.append(embed.register_forward_hook(Follow(self.runtime), with_kwargs=True))
        if request.strict:
            self._hooks.append(model.register_forward_pre_hook(Missed(self.runtime, [s[0].path for s in self._sites])))
            self._hooks.append(
                model.register_forward_hook(Missed(self.runtime, [s[0].path for s in self._sites], True))
            )

    def remove(self) -> None:
        """See `visattn.handle.Patch`. A class that someone else has set since stays."""
        for _, module, _, kind in self._sites:
            if type(module) is swapped_class(kind, record_of_class(kind).mixin):
                module.__class__ = kind
            module.__dict__.pop("visattn_site", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

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
        return [self._report(name.path, pattern, kind, rows) for name, _, pattern, kind in self._sites]

    def _report(self, path: str, pattern: Pattern, kind: type, rows: dict[str, Row]) -> SiteReport:
        row = rows.get(path, Row())
        found = SiteReport.of(self._name, path, pattern, self._request.backend, row)
        if record_of_class(kind).tokens:
            return found
        # A block of Swin never runs its own windows for a pattern, even where that covers the grid.
        calls = []
        for problem, hits in row.hits.most_common():
            name = choose(problem, self._request.backend).name
            calls.append(CallReport(problem, hits, name, "with the position bias", density(problem)))
        return SiteReport(
            found.model, path, pattern, tuple(calls), found.dense, found.fallbacks, found.sparse_seconds, 0.0
        )


def _embedding(host: Any) -> nn.Module | None:
    """The patch embedding of a model whose tokens all are of one grid, None if it has none of that kind."""
    for name in ("embeds", "patch_embed"):
        embed = getattr(host, name, None)
        # CrossViT has a list of two, PiT one whose grid the next stages pool.
        if hasattr(embed, "dynamic_feat_size"):
            return embed
    return None


def _sites(model: nn.Module, name: str) -> list[tuple[SiteName, nn.Module]]:
    """The modules that can be swapped, in the order of the layers."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "visattn_site"):
            raise ValueError(f"{name} is swapped already: call remove() on its handle before apply()")
        record = record_of(module)
        if record is not None:
            layer = path.rpartition(".")[0] if record.tokens else path
            found.append((SiteName(path, layer), module))
    if not found:
        known = ", ".join(sorted({kind.rpartition(".")[2] for kind in RECORDS}))
        grids = any(hasattr(module, "partition_block") for module in model.modules())
        why = "; its grid attention sees a few tokens of the whole map already" if grids else ""
        if type(model).__module__.startswith("visattn.models."):
            why = "; this backbone has the attention of its paper, chosen by its own arguments"
        raise ValueError(f"{name} has no attention module that visattn can swap (it knows {known} of timm){why}")
    return found
