"""Which module of a timm model tells where the tokens of a sequence sit, and how.

An attention on a sequence does not see its grid. In most models all tokens are those of the patch embedding; in models
of several stages or branches each of those has a grid of its own, made by a module near to its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from visattn.layout import Layout
from visattn.models.sizes import check_fixed

Grid = tuple[int, int]
Rule = Callable[[Any, tuple[Any, ...], Any], Grid]


@dataclass(frozen=True, eq=False)
class Source:
    """What tells a grid.

    Attributes:
        module: Runs once before the blocks with that grid.
        rule: Rows and columns from the module, its positional arguments and its output.
        prefix: Dense tokens before the grid.
        flexible: Whether the module also takes batches whose samples have grids of their own.
    """

    module: nn.Module
    rule: Rule
    prefix: int
    flexible: bool = False


def between(grid: Sequence[int], keys: Sequence[int], prefix: int = 0) -> Layout:
    """Queries on one map and keys on another, which are of the same image; so many dense tokens before either."""
    own, others = (Layout((int(side[0]), int(side[1])), prefix=prefix) for side in (grid, keys))
    return own.with_keys(others)


def source_of(model: nn.Module, path: str) -> Source | None:
    """The source of the grid of the attention at `path` of a model, None where nobody tells."""
    steps = path.split(".")
    for end in range(len(steps), -1, -1):
        around: Any = model.get_submodule(".".join(steps[:end]))
        find = _FINDERS.get(f"{type(around).__module__}.{type(around).__qualname__}")
        found = _of_embedding(around) if find is None else find(around, steps[end:])
        if found is not None:
            return found
    return None


def _of_embedding(host: Any) -> Source | None:
    """The patch embedding of a model whose tokens all are of one grid."""
    for name in ("embeds", "patch_embed", "pixel_embed"):
        embed: Any = getattr(host, name, None)
        # Others have several, or one that does not make the tokens of the attention alone.
        if hasattr(embed, "dynamic_feat_size"):
            return Source(embed, _embedded, int(getattr(host, "num_prefix_tokens", 0)), name == "embeds")
    return None


def _embedded(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
    """Rows and columns of patches, from what a patch embedding got and gave."""
    if isinstance(out, tuple):  # NaFlexViT: tokens and grid
        return _pair(out[1])
    if out.ndim == 4:
        return last_map(module, args, out) if _is_nhwc(module) else first_map(module, args, out)
    if math.prod(module.grid_size) == out.shape[1]:
        return _pair(module.grid_size)
    return _pair(module.dynamic_feat_size(tuple(args[0].shape[-2:])))


def _is_nhwc(module: Any) -> bool:
    return "NHWC" in str(getattr(module, "output_fmt", "NHWC")).upper()


def _pair(size: Any) -> Grid:
    check_fixed(size)
    return int(size[0]), int(size[1])


def first_map(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
    """Of an output [B, C, H, W], alone or the first of several."""
    made = out[0] if isinstance(out, tuple) else out
    return _pair(made.shape[-2:])


def last_map(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
    """Of an output [B, H, W, C]."""
    return _pair(out.shape[1:3])


def _given_map(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
    """Of an input [B, C, H, W]."""
    return _pair(args[0].shape[-2:])


def _patches(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
    """Of an image [B, C, H, W] that is cut into patches."""
    height, width = args[0].shape[-2:]
    return _pair((height // module.patch_size[0], width // module.patch_size[1]))


def _meta_stage(stage: Any, path: list[str]) -> Source:
    return Source(stage.downsample, first_map, 0)


def _pit(model: Any, path: list[str]) -> Source:
    """The first stage has the embedding's grid, each other that of its pooling."""
    pool = model.transformers[int(path[1])].pool
    return Source(model.patch_embed if pool is None else pool, first_map, int(model.num_tokens))


def _cross(model: Any, path: list[str]) -> Source:
    """A branch has a patch embedding of its own."""
    return Source(model.patch_embed[int(path[3])], _patches, 1)


def _mobile_vit(block: Any, path: list[str]) -> Source:
    """The tokens of a sequence are those at one place of all patches."""
    height, width = block.patch_size

    def rule(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
        return _pair((math.ceil(out.shape[2] / height), math.ceil(out.shape[3] / width)))

    return Source(block.conv_1x1, rule, 0)


def _efficient_former(stage: Any, path: list[str]) -> Source:
    """Its last blocks are on the sequence that one module makes of the map."""
    flat = next(block for block in stage.blocks if type(block).__name__ == "Flat")
    return Source(flat, _given_map, 0)


def _csat(block: Any, path: list[str]) -> Source:
    def rule(module: Any, args: tuple[Any, ...], out: Any) -> Grid:
        return _pair(args[1])

    return Source(block.pos_embed, rule, 0)


def _gemma(model: Any, path: list[str]) -> Source:
    return Source(model.patch_embed, _patches, 0, True)


# By module and name of a class around the attention, with the rest of the path.
_FINDERS: dict[str, Callable[[Any, list[str]], Source]] = {
    "timm.models.metaformer.MetaFormerStage": _meta_stage,
    "timm.models.pit.PoolingVisionTransformer": _pit,
    "timm.models.crossvit.CrossVit": _cross,
    "timm.models.mobilevit.MobileVitBlock": _mobile_vit,
    "timm.models.csatv2.TransformerBlock": _csat,
    "timm.models.gemma4_vit.Gemma4VitEncoder": _gemma,
    "timm.models.efficientformer.EfficientFormerStage": _efficient_former,
}
