"""One data record per diffusers model family."""

from __future__ import annotations

from typing import Any

import torch

from visattn.given import said
from visattn.pipelines.families import clips, control, edit, image, image_text, unets, unknown, video, wider, worlds
from visattn.pipelines.families.base import Family
from visattn.registry import REGISTRY


def _accept(name: str, family: Any) -> Family:
    if not isinstance(family, Family):
        raise ValueError(f"{said(family)} must be a visattn.pipelines.families.base.Family")
    if name not in family.classes:
        raise ValueError(f"family {family.name!r} is of {', '.join(family.classes) or 'no class'}, not of {name!r}")
    return family


_MODULES = (unets, image, image_text, edit, wider, video, clips, worlds, control)
_OURS = tuple(family for module in _MODULES for family in module.FAMILIES)
# Families by the names of their model classes.
FAMILIES = REGISTRY.declare("family", {name: family for family in _OURS for name in family.classes}, _accept)


def find_family(model: torch.nn.Module) -> Family | None:
    """The family of a model, by the names of its classes, the most derived one first.

    Raises:
        ValueError: If it is of another package and cannot be used.
    """
    return next((FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in FAMILIES), None)


def known_classes() -> str:
    """The model classes of all families, as a text."""
    return ", ".join(FAMILIES)


def why_unknown(model: torch.nn.Module) -> str:
    """Why the class of a model has no record, by the names of its classes; "" if that is not known."""
    return next(filter(None, (unknown.reason(kind.__name__) for kind in type(model).__mro__)), "")
