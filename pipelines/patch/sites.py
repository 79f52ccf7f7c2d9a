"""The attention modules that a patch selects, and which processor is in each of them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch

from visattn.parameters import make_parameters
from visattn.patterns import Dense, Pattern
from visattn.pipelines.families.base import Family
from visattn.pipelines.patch import bare, clones
from visattn.pipelines.patch.group import Group
from visattn.request import patched_already
from visattn.schedule import Given, Schedule
from visattn.selectors import SiteName


@dataclass
class Site:
    """One attention module that is patched.

    Attributes:
        name: Its path and layer.
        module: The module.
        pattern: What it was given, for each step where it is `Staged`.
        index: Its number among the sites.
        installed: The processor that calls the group.
        group: The group it calls.
        parameters: Learnable parameters of the pattern, None if it has none.
        precision: What the pattern computes in, None for the model's own dtype.
    """

    name: SiteName
    module: torch.nn.Module
    pattern: Given
    index: int
    installed: Any = None
    group: Group | None = None
    parameters: torch.nn.ParameterDict | None = None
    precision: str | None = None

    @property
    def intact(self) -> bool:
        """Whether the module still calls its group."""
        if self.group is None or self.module.processor is not self.installed:
            return False
        lease = clones.lease_of(self.installed)
        return lease is not None and lease.owner is self.group

    def adopt(self) -> bool:
        """Take over a processor of this patch that somebody has put back, if it does what the site asks for."""
        processor: Any = self.module.processor
        lease = clones.lease_of(processor)
        if self.group is None or lease is None or lease.owner is not self.group:
            return False
        place = clones.place_of(processor)
        if place is not None and place.index != self.index:
            return False
        self.installed = processor
        return True


def find_sites(
    model: torch.nn.Module,
    family: Family,
    schedule: Schedule,
    name: str,
    dims: int,
    taken: Set[int] = frozenset(),
    shared: bool = False,
) -> list[Site]:
    """The selected modules of a model, in the order of the layers.

    Args:
        model: The model.
        family: What is known about it.
        schedule: What selects.
        name: What errors call the model in its pipeline.
        dims: Axes of the token grid.
        taken: Identities of modules that another model's patch has.
        shared: Whether processes share the tokens: what is not selected is dense then, over all of them.

    Raises:
        ValueError: If there is none, or the model is patched already.
    """
    found = [(site, module) for site, module in family.find_sites(model) if id(module) not in taken]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention modules at {', '.join(family.sites)}")
    names, title = [site for site, _ in found], type(model).__name__
    patterns, precisions = schedule.assign(names, title), schedule.precisions(names, title)
    if shared:
        patterns = [Dense() if p is None else p for p in patterns]
    given = zip(found, patterns, precisions, strict=True)
    chosen = [(site, m, p, precision) for (site, m), p, precision in given if p is not None]
    sites = [Site(site, m, p, index, precision=precision) for index, (site, m, p, precision) in enumerate(chosen)]
    patched = [site.name.path for site in sites if clones.is_patched(getattr(site.module, "processor", None))]
    if patched:
        raise ValueError(patched_already(name, patched, len(sites)))
    for site in sites:
        if isinstance(site.pattern, Pattern) and site.pattern.learnable:
            site.parameters = make_parameters(model, site.module, site.pattern, dims)
    for site in sites:
        bare.give_processor(site.module)
    return sites
