"""Which models of a pipeline are patched, and by what record."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from visattn.dims import check_dims
from visattn.given import class_among
from visattn.patterns import MergingPattern, Pattern
from visattn.pipelines.families import find_family, known_classes, why_unknown
from visattn.pipelines.families.base import Family, Seen
from visattn.request import Request

# Names under which pipelines keep the models that denoise.
DENOISERS = ("transformer", "transformer_2", "unet", "prior")
CONTROLNETS = ("controlnet",)


class Target(NamedTuple):
    """One model to patch.

    Attributes:
        name: What reports call it.
        model: The model.
        family: What is known about its class.
        request: What is asked for it.
    """

    name: str
    model: torch.nn.Module
    family: Family
    request: Request


def find(target: Any, request: Request) -> list[Target]:
    """The models to patch: the target itself, or the denoisers of a pipeline and its ControlNets.

    Raises:
        ValueError: If there is nothing to patch, or the pattern does not fit.
    """
    if isinstance(target, torch.nn.Module):
        found = models_in(target)
        if found == [_unwrapped(target)]:
            return [_target(type(found[0]).__name__, found[0], request)]
        return _once(_target(f"nets.{i}", net, request) for i, net in enumerate(found))
    parts = {name: getattr(target, name, None) for name in DENOISERS}
    denoisers = {name: _unwrapped(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    if not denoisers:
        raise ValueError(f"{type(target).__name__} has none of {', '.join(DENOISERS)}: apply to one of its models")
    known = {name: model for name, model in denoisers.items() if find_family(model) is not None}
    chosen = denoisers if request.layouts else known or denoisers
    return _once([*(_target(name, model, request) for name, model in chosen.items()), *_control(target, request)])


def _once(found: Iterable[Target]) -> list[Target]:
    """Each model under its first name alone: one ControlNet can serve two pictures, one transformer both stages."""
    first: dict[int, Target] = {}
    for one in found:
        first.setdefault(id(one.model), one)
    return list(first.values())


def _control(pipeline: Any, request: Request) -> Iterator[Target]:
    """The ControlNets of a pipeline; one that cannot be patched keeps its attention, and a warning says why."""
    # Their tokens are not where a layout for the denoiser says, and their records know.
    request = dataclasses.replace(request, layouts=())
    for name, model in _controlnets(pipeline):
        if class_among(model, ["ControlNetXSAdapter"]):
            # A part of the pipeline's UNet, which is patched.
            continue
        try:
            target = _target(name, model, request)
            request.schedule.assign([site for site, _ in target.family.find_sites(model)], type(model).__name__)
        except ValueError as error:
            warnings.warn(f"{name} keeps its attention: {error}", stacklevel=6)
            continue
        yield target


def _controlnets(pipeline: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in CONTROLNETS:
        part = getattr(pipeline, name, None)
        found = models_in(part)
        if found == [_unwrapped(part)]:
            yield name, found[0]
        else:
            yield from ((f"{name}.nets.{i}", net) for i, net in enumerate(found))


def models_in(part: Any) -> list[torch.nn.Module]:
    """The models of an attribute of a pipeline: itself, those of a list, or the `nets` of several ControlNets."""
    if isinstance(part, list | tuple):
        return [model for each in part for model in models_in(each)]
    if not isinstance(part, torch.nn.Module):
        return []
    nets = getattr(part, "nets", None)
    return [_unwrapped(net) for net in nets] if isinstance(nets, torch.nn.ModuleList) else [_unwrapped(part)]


def _unwrapped(model: Any) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)


def _target(name: str, model: torch.nn.Module, request: Request) -> Target:
    family = _family(model, request)
    for pattern in request.schedule.patterns:
        check_dims(pattern, request.layouts[0].dims if request.layouts else family.dims, type(model).__name__)
        if isinstance(pattern, MergingPattern):
            _check_merging(pattern, model, family, request)
    return Target(name, model, family, request)


def _family(model: torch.nn.Module, request: Request) -> Family:
    family = find_family(model)
    if family is None and request.layouts:
        return Family(
            type(model).__name__, (), request.layouts[0].dims, ("*",), lambda config, args: Seen(), wider=True
        )
    if family is None:
        why = why_unknown(model)
        raise ValueError(
            f"{type(model).__name__} is a model class that visattn does not know: pass layout=Layout(grid, prefix=..., "
            f"suffix=...) to say where its tokens sit{f' ({why})' if why else ''}; known classes: {known_classes()}"
        )
    if family.nothing:
        raise ValueError(f"{type(model).__name__}: {family.nothing}")
    return family.of(model.config)


def _check_merging(pattern: Pattern, model: torch.nn.Module, family: Family, request: Request) -> None:
    if not family.levels or request.layouts or not all(path.endswith("attn1") for path in family.sites):
        raise ValueError(
            f"{pattern} merges tokens of a UNet (Stable Diffusion 1.5, 2.1, XL) before they are projected, and "
            f"{type(model).__name__} {'was given a layout' if family.levels else 'is none'}: use agent(agents=...) here"
        )
    if request.backend != "auto":
        raise ValueError(
            f"{pattern.name} runs attention of its own: pass backend='auto' instead of {request.backend!r}"
        )
