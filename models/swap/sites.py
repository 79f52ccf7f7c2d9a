"""The attention modules of a timm model: those that can be swapped, and those that stay as they are with a reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from torch import nn
from torch.fx import GraphModule

from visattn.models.swap.places import Places
from visattn.models.swap.records import Record, keeps_forward, own_ways, record_of, swapped_class
from visattn.models.swap.refused import refusal_of
from visattn.models.swap.runtime import Swapped, is_swapped
from visattn.patterns import Dense, Pattern
from visattn.request import patched_already
from visattn.selectors import SiteName


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module.

    Attributes:
        name: Its path and layer.
        module: The module.
        record: How its class is swapped, None for a class that has no record.
        foreign: Why it stays as it is, empty if it can be swapped.
        pattern: What it was given.
        kind: The class it had.
    """

    name: SiteName
    module: nn.Module
    record_or_none: Record | None
    foreign: str
    pattern: Pattern = field(default_factory=Dense)
    kind: type = nn.Module

    @property
    def record(self) -> Record:
        """How its class is swapped."""
        assert self.record_or_none is not None, self.name
        return self.record_or_none

    @property
    def dense(self) -> bool:
        """Whether the module's own attention is dense on its map."""
        dense = self.record.dense
        return dense(self.module) if callable(dense) else dense

    @property
    def attention(self) -> nn.Module:
        """The module, or the one inside of it that has the attention."""
        return getattr(self.module, self.record.attention) if self.record.attention else self.module

    @property
    def places(self) -> Places | None:
        """Where the tokens of the swapped module sit, None for one that stays as it is."""
        swapped = self.module.__dict__.get("visattn_site")
        return None if swapped is None else swapped.places

    def given(self, pattern: Pattern) -> Site:
        """The site with a pattern."""
        return replace(self, pattern=pattern, kind=type(self.module))

    def swap(self, swapped: Swapped) -> None:
        """Let the module run its pattern."""
        if keeps_forward(self.module):
            # It would hide the one of the class.
            del self.module.__dict__["forward"]
        self.module.visattn_site = swapped  # type: ignore[assignment]
        self.module.__class__ = swapped_class(self.kind, self.record.mixin)

    def restore(self) -> None:
        """Undo `swap`. A class that someone derived from the swapped one stays, and has no pattern to run."""
        self.module.__dict__.pop("visattn_site", None)
        if not self.foreign and type(self.module) is swapped_class(self.kind, self.record.mixin):
            self.module.__class__ = self.kind


def find_sites(model: nn.Module, name: str) -> list[Site]:
    """The attention modules of the model called `name`, in the order of the layers.

    Raises:
        ValueError: If none of them can be swapped, or some are patched already.
    """
    modules = dict(model.named_modules())
    found = {path: record for path, module in modules.items() if (record := _record(path, module)) is not None}
    # Where other blocks have attention on sequences, a block may have one of a class that nobody knows.
    places = {_place(path, modules) for path, record in found.items() if record.tokens}
    swapped = [path for path in found if is_swapped(modules[path])]
    if swapped:
        raise ValueError(patched_already(name, swapped, len(found)))
    sites = []
    for path, module in modules.items():
        record = found.get(path)
        if record is not None:
            layer = path.rpartition(".")[0] if record.tokens else path
            why = own_ways(module) or ("" if record.unfit is None else record.unfit(module))
            sites.append(Site(SiteName(path, layer), module, record, why))
        elif _place(path, modules) in places and not isinstance(module, nn.Identity):
            why = refusal_of(module) or f"{type(module).__qualname__} is no attention that visattn knows"
            sites.append(Site(SiteName(path, path.rpartition(".")[0]), module, None, why))
    if all(site.foreign for site in sites):
        raise ValueError(_nothing(model, name, sites))
    return sites


def _record(path: str, module: nn.Module) -> Record | None:
    """The record of the attention at a path, None if there is none that patterns are for."""
    record = record_of(module)
    return None if record is None or (record.beside is not None and record.beside(path)) else record


def _place(path: str, modules: dict[str, nn.Module]) -> tuple[str, type]:
    """A path without the number of its block, and the class of what holds it; another stage is another place."""
    return re.sub(r"\d+(?!.*\d)", "*", path), type(modules.get(path.rpartition(".")[0]))


def _nothing(model: nn.Module, name: str, sites: list[Site]) -> str:
    """Why a model has nothing to swap."""
    modules = list(model.modules())
    reasons = {site.foreign for site in sites}
    reasons |= {f"{type(m).__qualname__}: {why}" for m in modules if (why := refusal_of(m))}
    if any(hasattr(module, "partition_block") for module in modules):
        reasons = {"its grid attention sees a few tokens of the whole map already"}
    if type(model).__module__.startswith("visattn.models."):
        reasons = {"this backbone has the attention of its paper, chosen by its own arguments"}
    if any(isinstance(module, GraphModule) for module in modules):
        why = "apply() to the model first, and make the extractor of that"
        reasons = {f"torch.fx has traced through its modules: {why}"}
    why = "; ".join(sorted(reasons)) or "none of its modules is one; `visattn models` lists those of timm"
    return f"{name} has no attention module that visattn can swap: {why}"
