"""The vision towers of a model of transformers, and their attention modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from visattn.clients.transformers.records import RECORDS, REFUSED, Record
from visattn.clients.transformers.swaps import swapped_class
from visattn.forwards import HOOK, HOOKED, keeps_forward
from visattn.patterns import Dense, Neighborhood, Pattern
from visattn.positions import check_positions
from visattn.request import patched_already
from visattn.selectors import SiteName


class Found(NamedTuple):
    """An attention module: its name and the module."""

    name: SiteName
    module: Any


@dataclass(frozen=True, eq=False)
class Tower:
    """One vision tower.

    Attributes:
        record: What is known about its class.
        path: In the model, "" if it is the model.
        module: The tower.
        anchor: The module whose arguments tell where the tokens sit.
        sites: Its attention modules that a pattern can run in, in the order of the layers.
    """

    record: Record
    path: str
    module: nn.Module
    anchor: nn.Module
    sites: tuple[Found, ...]

    @property
    def config(self) -> Any:
        """Its configuration: that of its attention, if this has one."""
        return getattr(self.sites[0].module, "config", None) or self.module.config

    @property
    def dims(self) -> int:
        """Axes of its token grid."""
        return 3 if self.record.reader.__name__ == "video" else 2


def find_towers(model: nn.Module, name: str) -> list[Tower]:
    """The vision towers of the model called `name`.

    Raises:
        ValueError: If it has none that visattn knows, or one in which no pattern can run.
    """
    modules = dict(model.named_modules())
    towers = list(_towers(modules, name))
    if not towers:
        raise ValueError(_nothing(modules, name))
    return towers


def _towers(modules: dict[str, nn.Module], name: str) -> Iterator[Tower]:
    for path, anchor in modules.items():
        record = next((record for record in RECORDS if record.is_anchor(anchor)), None)
        if record is None:
            continue
        if record.refused:
            raise ValueError(f"{name}: no pattern can run in {type(anchor).__name__}: {record.refused}")
        tower = path if record.whole else path.rpartition(".")[0]
        found = tuple(_sites(modules, record, tower))
        if found:
            yield Tower(record, tower, modules[tower], anchor, found)


def _sites(modules: dict[str, nn.Module], record: Record, tower: str) -> Iterator[Found]:
    """The attention modules of a tower that a pattern has something to do in."""
    inside = f"{tower}." if tower else ""
    block = 0
    for path, module in modules.items():
        if not path.startswith(inside) or not record.is_attention(module):
            continue
        around = modules[path.rpartition(".")[0]]
        if record.skips is None or not record.skips(module, around, block):
            yield Found(SiteName(path, _layer(path)), module)
        block += 1


def _layer(path: str) -> str:
    """The path up to its last number: the block around an attention module."""
    match = re.match(r"(.*\.\d+)(?:\.[^0-9]|$)", path)
    return match[1] if match else path.rpartition(".")[0]


def check_free(towers: list[Tower], name: str) -> None:
    """Raise a ValueError if a tower is patched already."""
    for tower in towers:
        if any(getattr(site.module, "visattn_site", None) is not None for site in tower.sites):
            raise ValueError(patched_already(name, [name], 1))


def check_forwards(tower: Tower) -> None:
    """Refuse modules that were given a forward of their own, where a patch changes their class; see `keeps_forward`.

    Raises:
        ValueError: If one has.
    """
    mixin = tower.record.swap
    for site in tower.sites if mixin is not None else ():
        module = site.module
        if HOOK in module.__dict__:
            raise ValueError(f"{site.name.path}: {HOOKED}")
        if keeps_forward(module, (type(module), swapped_class(type(module), mixin))):
            # It would hide the one of the class.
            del module.__dict__["forward"]
        if "forward" in module.__dict__:
            raise ValueError(f"{site.name.path} has no attention that visattn can swap: its forward was replaced")


def check_bias(pattern: Pattern, tower: Tower, name: str) -> None:
    """Raise a ValueError if a pattern cannot carry the position bias of a tower."""
    if tower.record.bias and not isinstance(pattern, Neighborhood | Dense):
        raise ValueError(
            f"{pattern} cannot carry the relative position bias of {name}: use na(window=...), which can, or 'dense'"
        )
    if any(getattr(site.module, "use_rel_pos", False) for site in tower.sites):
        check_positions(pattern, name)


def _nothing(modules: dict[str, nn.Module], name: str) -> str:
    """Why a model has nothing to patch."""
    folders = {kind.__module__.split(".")[2] for kind in map(type, modules.values()) if _is_of_models(kind)}
    why = "; ".join(f"{folder}: {REFUSED[folder]}" for folder in sorted(folders & set(REFUSED)))
    if why:
        other = "timm may have it in a form that apply() swaps"
        return f"{name} has no vision tower that a pattern can run in ({why}); {other}"
    known = ", ".join(record.models for record in RECORDS if not record.refused)
    return f"{name} ({', '.join(sorted(folders))}) has no vision tower that visattn knows: it knows {known}"


def _is_of_models(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


Assigned = list[tuple[Found, Pattern]]
