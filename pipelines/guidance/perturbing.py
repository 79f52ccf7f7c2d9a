"""The attention modules of one patched model that are perturbed, for the time of some of its forwards."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from visattn.dims import check_dims
from visattn.given import mapping, said
from visattn.patterns import MergingPattern, Pattern, parse
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.sites import Site
from visattn.runtime.perturbed import Blur, Perturbed
from visattn.schedule import Schedule
from visattn.selectors import Layers

# Caches that keep what modules returned last, whatever the pipeline calls the forward.
MIXING = ("FasterCacheConfig", "PyramidAttentionBroadcastConfig")


class Perturbation:
    """What perturbs a model between `begin` and `stop`.

    Args:
        patched: The model.
        by: What stands for the attention of its modules.
        layers: Which layers, None for the middle ones.
        heads: Which heads of which layers, instead of `layers`.
        strength: How much of it they get.

    Attributes:
        by: As given.
        modules: What stands for each module, by its path.

    Raises:
        ValueError: If the model is compiled, the perturbation does not fit it, or nothing is selected.
    """

    def __init__(
        self,
        patched: PatchedModel,
        by: Pattern | Blur,
        layers: Layers,
        heads: Mapping[str, Sequence[int]] | None,
        strength: float,
    ) -> None:
        chosen = chosen_sites(patched, layers, heads)
        model = patched.model
        if any(getattr(each, "_compiled_call_impl", None) is not None for each in model.modules()):
            raise ValueError(
                f"{type(model).__name__} is compiled, which hides its attention modules: guide it uncompiled"
            )
        if isinstance(by, Pattern):
            check_dims(by, patched.family.dims, type(model).__name__)
        self.by, self._patched = by, patched
        self.modules: dict[str, Perturbed] = {}
        for site, some in chosen:
            assert site.group is not None
            self.modules[site.name.path] = Perturbed(patched.run, site.group, by, strength, some)

    @property
    def calls(self) -> int:
        """Calls of attention that it stood in for."""
        return sum(each.calls for each in self.modules.values())

    def begin(self) -> None:
        """From here on forwards of the model, in this thread, are perturbed.

        Raises:
            ValueError: If the model has a cache that would mix them with others.
        """
        check_cache(self._patched.model)
        self._patched.run.here.perturbed = self.modules

    def stop(self) -> None:
        """Forwards are as ever again."""
        self._patched.run.here.perturbed = None

    def check_called(self, earlier: int = 0) -> None:
        """Refuse modules that the model does not call.

        Args:
            earlier: Calls that are known from forwards before: a cache may skip them in some.

        Raises:
            ValueError: If there was none.
        """
        if not (earlier or self.calls):
            name = type(self._patched.model).__name__
            raise ValueError(f"guide: {name} did not call {', '.join(self.modules)}: choose others")

    def said(self) -> str:
        """What is perturbed, in words."""
        paths = list(self.modules)
        places = f"{', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''}"
        return f"{self.by} in {len(paths)} attention modules ({places})"


def check_cache(model: torch.nn.Module) -> None:
    """Refuse caches that do not tell forwards apart."""
    cache = type(getattr(model, "_cache_config", None)).__name__
    if cache in MIXING:
        raise ValueError(
            f"guide: the cache of {cache} would mix perturbed attention with plain: use one that tells forwards "
            "apart, like FirstBlockCacheConfig or MagCacheConfig"
        )


def chosen_sites(
    patched: PatchedModel, layers: Layers, heads: Mapping[str, Sequence[int]] | None
) -> list[tuple[Site, frozenset[int] | None]]:
    """The modules that are perturbed, each with its heads, None for all."""
    sites, model = patched.sites, type(patched.model).__name__
    names = [site.name for site in sites]
    if heads is None:
        picked = _middle(sites) if layers is None else layers
        given = Schedule.of("dense", picked).assign(names, model)
        return [(site, None) for site, each in zip(sites, given, strict=True) if each is not None]
    found: dict[int, frozenset[int]] = {}
    for layer, numbers in heads.items():
        chosen = frozenset(numbers)
        for i, each in enumerate(Schedule.of("dense", str(layer)).assign(names, model)):
            if each is not None:
                found[i] = found.get(i, frozenset()) | chosen
    return [(sites[i], found[i]) for i in sorted(found)]


def _check_heads(heads: Any) -> None:
    """Raise a ValueError for what are not heads of layers."""
    for layer, numbers in mapping(heads, "heads", "from layers to heads, like {'3': [1, 7]}").items():
        fits = isinstance(numbers, Collection) and not isinstance(numbers, str | bytes | Mapping) and len(numbers)
        if not fits or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError(f"heads[{layer!r}]={said(numbers)} must be indices of heads, from 0")


def _middle(sites: Sequence[Site]) -> list[str]:
    """Names of the layers in the middle: a UNet's middle block, else a fifth of all."""
    layers = list(dict.fromkeys(site.name.layer for site in sites))
    blocks = [layer for layer in layers if layer.startswith("mid_block")]
    if blocks:
        return blocks
    middle, around = len(layers) // 2, len(layers) // 10
    return layers[middle - around : middle + around + 1]


def perturbation_of(perturb: str | Pattern) -> Pattern | Blur:
    """What a perturbation is by its name.

    Args:
        perturb: "identity", "blur", "blur(sigma=2)", or any pattern.

    Raises:
        ValueError: If it is none of them, or a pattern with weights or one that merges tokens.
    """
    if isinstance(perturb, str):
        match = re.fullmatch(r"blur(?:\(sigma=(\d+(?:\.\d+)?)\))?", perturb.strip())
        if match:
            return Blur(float(match[1]) if match[1] else math.inf)
    try:
        by = parse("na(window=1)" if perturb == "identity" else perturb)
    except ValueError as error:
        raise ValueError(
            f"perturb={said(perturb)} is not 'identity', 'blur' or 'blur(sigma=2)', and as a pattern: {error}"
        ) from None
    if isinstance(by, MergingPattern) or by.needs_weights or by.learnable:
        raise ValueError(
            f"perturb={perturb!r} must be 'identity', 'blur', 'blur(sigma=2)' or a pattern without weights"
        )
    return by


def check_options(
    scale: float,
    strength: float,
    start: float,
    stop: float,
    layers: Layers,
    heads: Mapping[str, Sequence[int]] | None,
) -> None:
    """Refuse options of guidance that are out of range."""
    if heads is not None:
        _check_heads(heads)
    if layers is not None and heads is not None:
        raise ValueError("layers and heads both say which layers are perturbed: give one of them")
    for name, value in {"scale": scale, "strength": strength, "start": start, "stop": stop}.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}={said(value)} is a {type(value).__name__}: pass a number")
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale={scale} must be a number from 0 up, 3 as in the paper")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must be from 0 to 1, the share of the perturbation that heads get")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start={start} and stop={stop} must be shares of the steps, 0 <= start < stop <= 1")
