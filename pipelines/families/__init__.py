"""One data record per diffusers model family."""

from __future__ import annotations

import torch

from visattn.pipelines.families import image, video
from visattn.pipelines.families.base import Family

FAMILIES: tuple[Family, ...] = (*image.FAMILIES, *video.FAMILIES)


def find_family(model: torch.nn.Module) -> Family | None:
    """The family of a model, by the names of its classes."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return next((family for name in names for family in FAMILIES if name in family.classes), None)


def known_classes() -> str:
    """The model classes of all families, as a text."""
    return ", ".join(name for family in FAMILIES for name in family.classes)
