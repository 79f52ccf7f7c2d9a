"""What visattn knows about a model family: where its self-attention is and where the tokens sit."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from visattn.runtime.where import Sample
from visattn.selectors import SiteName

Args = Mapping[str, Any]


class Seen(NamedTuple):
    """What the arguments of a model's forward tell about its tokens.

    Filled while torch.compile traces, so numbers may be symbolic and nothing may be computed from tensor values.

    Attributes:
        grid: Tokens per axis, or () if `ids` or `samples` tell them.
        prefix: Tokens before the grid, or REST.
        suffix: Tokens after the grid, or REST.
        ids: A tensor whose values tell the rest; `Family.read` reads it when the model runs.
        why: Why there is no grid, if there is none.
        samples: Where the tokens of each sample sit, where samples differ.
    """

    grid: tuple[int, ...] = ()
    prefix: int = 0
    suffix: int = 0
    ids: torch.Tensor | None = None
    why: str = ""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model family as data.

    Attributes:
        name: What reports and errors call it.
        classes: Model class names.
        dims: Axes of the token grid; 0 where they are as many as those of a model's `patch_size`.
        sites: Globs of the paths of its visual self-attention modules, in the order in which layers run.
        seen: Finds the tokens from the model's config and the arguments of its forward.
        read: Completes that from the config and the values of `Seen.ids`.
        anchor: Argument of the forward that carries the latents.
        levels: How an odd grid is halved from level to level, as in a UNet, "ceil" or "floor"; "" if it is not.
        mask_row: Row of a full mask [B, 1, S, S] that tells which keys are valid; None if such masks do not
            come from key validity.
        wider: Whether calls may have keys beyond their queries, which every query sees: keys are then the sequence
            that `seen` describes, and queries its grid or its end.
        apart: Whether its full masks hold rows of text before the grid that differ from the grid's, as of causal text:
            these rows keep them, and `mask_row` is one of the grid.
        early: Whether some layers attend before the tokens in front of the grid join: to the grid and what follows.
        crossing: Whether its sites say that they are cross-attention, although what they attend to is their own input.
        pieces: Whether its sites also attend piece by piece among text alone, causally: such calls are the model's own,
            and no report counts them.
        bare: Whether its sites have no processor: those count whose own forward calls torch's attention, and uses
            nothing of the module.
        nothing: Why there is nothing to patch, for families without quadratic visual self-attention.
        tokens: How its tokens are ordered, in words.
    """

    name: str
    classes: tuple[str, ...]
    dims: int
    sites: tuple[str, ...]
    seen: Callable[[Any, Args], Seen]
    read: Callable[[Any, torch.Tensor, Seen], Seen] | None = None
    anchor: str = "hidden_states"
    levels: str = ""
    mask_row: int | None = None
    wider: bool = False
    apart: bool = False
    early: bool = False
    crossing: bool = False
    pieces: bool = False
    bare: bool = False
    nothing: str = ""
    tokens: str = "grid"

    def of(self, config: Any) -> Family:
        """The record of a model with this config, whose `dims` is known."""
        return self if self.dims else replace(self, dims=len(config.patch_size))

    def find_sites(self, model: torch.nn.Module) -> list[tuple[SiteName, torch.nn.Module]]:
        """The visual self-attention modules of a model, in the order in which layers run.

        The same paths can hold cross-attention, as in the outer levels of the upscaler of Stable Diffusion.
        """
        found = []
        for order, pattern in enumerate(self.sites):
            for path, module in model.named_modules():
                if not fnmatch.fnmatchcase(path, pattern) or not self._attends(module):
                    continue
                if self.crossing or not getattr(module, "is_cross_attention", False):
                    found.append(((order, _natural(path)), SiteName(path, path.rpartition(".")[0]), module))
        found.sort(key=lambda entry: entry[0])
        return [(site, module) for _, site, module in found]

    def _attends(self, module: torch.nn.Module) -> bool:
        """Whether a module has a processor, or is one itself."""
        if hasattr(module, "processor"):
            return True
        return self.bare and "scaled_dot_product_attention" in type(module).forward.__code__.co_names


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", path)]


def patches(config: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens per axis after patchifying latents of these sizes: (H, W) or (F, H, W), rounded down."""
    size = getattr(config, "patch_size", None) or 1
    each = tuple(size) if isinstance(size, tuple | list) else (size,) * len(sizes)
    if len(sizes) == 3 and len(each) == 3 and not isinstance(size, tuple | list):
        each = (getattr(config, "patch_size_t", None) or 1, size, size)
    return tuple(n // p for n, p in zip(sizes, each, strict=True))
