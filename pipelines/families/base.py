"""What visattn knows about a model family: where its self-attention is and where the tokens sit."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from visattn.layout import Layout
from visattn.schedule import SiteName

Args = Mapping[str, Any]
# "Whatever is left": a number of text tokens that only the sequence length tells.
REST = -1


class Sample(NamedTuple):
    """Where the tokens of one sample of a batch sit; what is left of the sequence follows the grid.

    Attributes:
        grid: Tokens per axis.
        prefix: Tokens before the grid.
    """

    grid: tuple[int, ...]
    prefix: int = 0


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
        levels: Whether the grid is halved (rounding up) from level to level, as in a UNet.
        mask_row: Row of a full mask [B, 1, S, S] that tells which keys are valid; None if such masks do not
            come from key validity.
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
    levels: bool = False
    mask_row: int | None = None
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
                if not fnmatch.fnmatchcase(path, pattern) or not hasattr(module, "processor"):
                    continue
                if not getattr(module, "is_cross_attention", False):
                    found.append(((order, _natural(path)), SiteName(path, path.rpartition(".")[0]), module))
        found.sort(key=lambda entry: entry[0])
        return [(site, module) for _, site, module in found]


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", path)]


@dataclass(frozen=True)
class Where:
    """Where the tokens of one forward sit; resolves the layout of a sequence from its length.

    Attributes:
        grid: Tokens per axis at full resolution.
        prefix: Tokens before the grid, or REST.
        suffix: Tokens after the grid, or REST.
        levels: Whether halved grids occur too.
        why: Why there is no grid, if there is none.
        samples: Where the tokens of each sample sit, where samples differ.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    levels: bool = False
    why: str = ""
    samples: tuple[Sample, ...] = ()

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        if self.why or not self.samples:
            found = self.layout(length)
            return found if isinstance(found, str) else (found,)
        grids = {Layout(sample.grid) for sample in self.samples}
        if len(grids) == 1 and length == next(iter(grids)).tokens:
            # Layers before the text joins.
            return tuple(grids)
        rest = [length - sample.prefix - math.prod(sample.grid) for sample in self.samples]
        if min(rest) < 0:
            return f"a sequence of {length} tokens is not {self}"
        return tuple(Layout(s.grid, s.prefix, after) for s, after in zip(self.samples, rest, strict=True))

    def layout(self, length: int) -> Layout | str:
        """The layout of a sequence of `length` tokens, or why there is none."""
        if self.why or not self.grid:
            return self.why or "its forward does not tell where its tokens sit: pass layout=Layout(grid, ...)"
        if min(self.grid) < 1:
            return f"its grid {_times(self.grid)} is empty"
        for grid in self._grids():
            inner = Layout(grid)
            rest = length - inner.tokens - max(self.prefix, 0) - max(self.suffix, 0)
            if rest == 0 or (rest > 0 and REST in (self.prefix, self.suffix)):
                prefix = rest if self.prefix == REST else self.prefix
                suffix = rest if self.suffix == REST else self.suffix
                return Layout(grid, prefix, suffix)
            if length == inner.tokens:
                # Some layers of joint models attend among image tokens alone.
                return inner
        return f"a sequence of {length} tokens is not {self}"

    def _grids(self) -> Iterator[tuple[int, ...]]:
        grid = self.grid
        yield grid
        while self.levels and max(grid) > 1:
            grid = tuple(-(-n // 2) for n in grid)
            yield grid

    def __str__(self) -> str:
        if self.samples:
            return " or ".join(
                f"prefix {sample.prefix} + grid {_times(sample.grid)}" for sample in dict.fromkeys(self.samples)
            )
        parts = [f"grid {_times(self.grid)}" + " or halves of it" * self.levels]
        if self.prefix:
            parts.insert(0, "text" if self.prefix == REST else f"prefix {self.prefix}")
        if self.suffix:
            parts.append("text" if self.suffix == REST else f"suffix {self.suffix}")
        return " + ".join(parts)


def _times(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


def patches(config: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens per axis after patchifying latents of these sizes: (H, W) or (F, H, W), rounded down."""
    size = getattr(config, "patch_size", 1)
    each = tuple(size) if isinstance(size, tuple | list) else (size,) * len(sizes)
    if len(sizes) == 3 and len(each) == 3 and not isinstance(size, tuple | list):
        each = (getattr(config, "patch_size_t", None) or 1, size, size)
    return tuple(n // p for n, p in zip(sizes, each, strict=True))
