"""Swaps the attention of timm models; the adapter of `visattn.apply`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from visattn.dispatch import choose
from visattn.handle import Request
from visattn.models.swap_flexible import grids_of
from visattn.models.swap_maps import CoAtBlock, DaVitBlock, ParallelPartition, PartitionFirst, PartitionLast
from visattn.models.swap_relative import BeitAttention, RelPosAttention
from visattn.models.swap_runtime import Runtime, Swapped
from visattn.models.swap_sam import SamBlock
from visattn.models.swap_tokens import RotaryAttention, TokenAttention
from visattn.models.swap_windows import SwinBlock, SwinV2Block
from visattn.parameters import Learnable, make_parameters
from visattn.patterns import Dense, Neighborhood, Pattern
from visattn.report import CallReport, Row, SiteReport, density
from visattn.schedule import SiteName, check_dims
from visattn.watch import Watcher


@dataclass(frozen=True)
class Record:
    """How a class of timm is swapped.

    Attributes:
        mixin: What is mixed into the class.
        bias: Whether it has a relative position bias, which only neighborhoods carry.
        tokens: Whether it sees a sequence (and the model has to say where its tokens sit), or maps.
        models: Which models have it, for people.
        attention: Name of its attention module, if the class is a block around one.
    """

    mixin: type
    bias: bool
    tokens: bool
    models: str
    attention: str = ""


RECORDS = {
    "timm.layers.attention.Attention": Record(TokenAttention, False, True, "ViT, DeiT, DeiT III, DINOv2, SigLIP, CLIP"),
    "timm.layers.attention.AttentionRope": Record(RotaryAttention, False, True, "rope ViTs, DINOv3, PE"),
    "timm.models.vision_transformer.Attention": Record(TokenAttention, False, True, "ViTs of older releases of timm"),
    "timm.models.eva.EvaAttention": Record(RotaryAttention, False, True, "EVA, EVA-02, DINOv3, rope ViTs"),
    "timm.models.beit.Attention": Record(BeitAttention, True, True, "BEiT, BEiT v2"),
    "timm.models.vision_transformer_relpos.RelPosAttention": Record(RelPosAttention, True, True, "vit_relpos"),
    "timm.models.swin_transformer.SwinTransformerBlock": Record(SwinBlock, True, False, "Swin, S3", "attn"),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": Record(SwinV2Block, True, False, "Swin v2", "attn"),
    "timm.models.maxxvit.PartitionAttentionCl": Record(
        PartitionLast, True, False, "MaxViT and MaxxViT: block attention, not grid attention", "attn"
    ),
    "timm.models.maxxvit.PartitionAttention2d": Record(PartitionFirst, True, False, "the same, channels first", "attn"),
    "timm.models.maxxvit.ParallelPartitionAttention": Record(
        ParallelPartition, True, False, "MaxViT with both at once: the block half", "attn_block"
    ),
    "timm.models.maxxvit.TransformerBlock2d": Record(CoAtBlock, True, False, "CoAtNet, CoAtNeXt", "attn"),
    "timm.models.davit.SpatialBlock": Record(DaVitBlock, False, False, "DaViT: spatial, not channel attention", "attn"),
    "timm.models.vision_transformer_sam.Block": Record(SamBlock, False, False, "SAM", "attn"),
}


def record_of(module: nn.Module) -> Record | None:
    """The record of a module's class, None if it is no attention that visattn knows."""
    kind = type(module)
    # MaxViT's grid attention sees a few tokens of the whole map, each far from the next: no pattern is near to that.
    if getattr(module, "partition_block", None) is False:
        return None
    return RECORDS.get(f"{kind.__module__}.{kind.__qualname__}")


@lru_cache(maxsize=64)
def swapped_class(kind: type, mixin: type) -> type:
    """The class of a swapped module."""
    return type(f"Swapped{kind.__name__}", (mixin, kind), {"__module__": __name__})


def install(target: Any, request: Request) -> list[SwappedModel]:
    """Swap the attention of a timm model.

    Raises:
        ValueError: If the model has no attention that visattn knows, the pattern does not fit it, or it is swapped
            already.
    """
    model = getattr(target, "_orig_mod", target)
    if request.schedule.dense_steps:
        raise ValueError("dense_steps counts denoising steps, and a timm model has none: use dense_layers or layers")
    return [SwappedModel(model, request)]


class SwappedModel:
    """One swapped model: its modules, what they were before, and the hooks that follow the image size."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._name, self._request = type(model).__name__, request
        found = _sites(model, self._name)
        patterns = request.schedule.assign([name for name, _ in found], self._name)
        chosen = [(n, m, p) for (n, m), p in zip(found, patterns, strict=True) if p is not None]
        for _, module, pattern in chosen:
            _check(module, pattern, self._name)
        host = next((m for m in model.modules() if hasattr(m, "patch_embed") or hasattr(m, "embeds")), model)
        prefix = int(getattr(host, "num_prefix_tokens", 0))
        self.runtime = Runtime(self._name, request.backend, request.layout, prefix)
        self._sites: list[tuple[SiteName, nn.Module, Pattern, type]] = []
        self._learnables: list[Learnable] = []
        for name, module, pattern in chosen:
            record = record_of(module)
            assert record is not None
            self._sites.append((name, module, pattern, type(module)))
            own = make_parameters(module, module, pattern, 2) if pattern.learnable else None
            if own is not None:
                self._learnables.append(Learnable(self._name, name.path, pattern, own))
            module.visattn_site = Swapped(self.runtime, name.path, pattern, own)  # type: ignore[assignment]
            module.__class__ = swapped_class(type(module), record.mixin)
        # On the module that drops them: forward_features and forward_intermediates pass the model's own hooks by.
        dropping = getattr(host, "patch_drop", None)
        self._hooks: list[Any] = []
        if isinstance(dropping, nn.Module):
            self._hooks.append(dropping.register_forward_pre_hook(refuse_dropped_patches))
        if any(record_of_class(kind).tokens for *_, kind in self._sites):
            embed = getattr(host, "embeds", None) or getattr(host, "patch_embed", None)
            if embed is None and request.layout is None:
                self.remove()
                raise ValueError(f"{self._name} has no patch_embed that tells its grid: pass layout=Layout(...)")
            if embed is not None:
                self._hooks.append(embed.register_forward_hook(Follow(self.runtime), with_kwargs=True))
        if request.strict:
            self._hooks.append(model.register_forward_pre_hook(Missed(self.runtime, [s[0].path for s in self._sites])))
            self._hooks.append(
                model.register_forward_hook(Missed(self.runtime, [s[0].path for s in self._sites], True))
            )

    def remove(self) -> None:
        """See `visattn.handle.Patch`. A class that someone else has set since stays."""
        for _, module, _, kind in self._sites:
            if type(module) is swapped_class(kind, record_of_class(kind).mixin):
                module.__class__ = kind
            module.__dict__.pop("visattn_site", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def learnables(self) -> Sequence[Learnable]:
        """See `visattn.handle.Patch`."""
        return self._learnables

    def watch(self, watcher: Watcher | None) -> None:
        """See `visattn.handle.Patch`."""
        self.runtime.watcher = watcher

    def set_step(self, step: int | None, total: int | None) -> None:
        """See `visattn.handle.Patch`; a timm model has no steps and `dense_steps` is refused."""

    def report(self) -> Sequence[SiteReport]:
        """See `visattn.handle.Patch`. Calls inside compiled code are not counted."""
        rows = self.runtime.tally.rows()
        return [self._report(name.path, pattern, kind, rows) for name, _, pattern, kind in self._sites]

    def _report(self, path: str, pattern: Pattern, kind: type, rows: dict[str, Row]) -> SiteReport:
        row = rows.get(path, Row())
        found = SiteReport.of(self._name, path, pattern, self._request.backend, row)
        if record_of_class(kind).tokens:
            return found
        # A block of Swin never runs its own windows for a pattern, even where that covers the grid.
        calls = []
        for problem, hits in row.hits.most_common():
            name = choose(problem, self._request.backend).name
            calls.append(CallReport(problem, hits, name, "with the position bias", density(problem)))
        return SiteReport(
            found.model, path, pattern, tuple(calls), found.dense, found.fallbacks, found.sparse_seconds, 0.0
        )


def record_of_class(kind: type) -> Record:
    """The record of a class that has one."""
    return RECORDS[f"{kind.__module__}.{kind.__qualname__}"]


class Follow:
    """After the patch embedding: tells the runtime the grid of this image."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A forward hook."""
        if isinstance(out, tuple) and out[1] is None:
            grids = grids_of(args, kwargs)
            if isinstance(grids, str):
                self.runtime.place(grids)
            else:
                self.runtime.place_samples(grids)
        else:
            self.runtime.place(_grid(module, args, out))


def _grid(module: Any, args: tuple[Any, ...], out: Any) -> tuple[int, int]:
    """Rows and columns of patches, from what a patch embedding got and gave."""
    if isinstance(out, tuple):  # NaFlexViT: tokens and grid
        return _pair(out[1])
    if out.ndim == 4:
        rows, columns = (out.shape[1], out.shape[2]) if _is_nhwc(module) else (out.shape[2], out.shape[3])
        return int(rows), int(columns)
    if math.prod(module.grid_size) == out.shape[1]:
        return _pair(module.grid_size)
    return _pair(module.dynamic_feat_size(tuple(args[0].shape[-2:])))


def _is_nhwc(module: Any) -> bool:
    return "NHWC" in str(getattr(module, "output_fmt", "NHWC")).upper()


def _pair(size: Any) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def refuse_dropped_patches(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Before timm's patch dropout runs in training: what it leaves is no grid."""
    rate = getattr(module, "prob", 0.0)
    if module.training and rate > 0:
        raise ValueError(
            f"patch_drop_rate={rate} drops patches in training, and the rest is no grid that a pattern could be "
            "applied to: create the model with patch_drop_rate=0, or remove() the handle for training"
        )


class Missed:
    """With `strict`: a forward must reach every swapped module."""

    def __init__(self, runtime: Runtime, paths: Iterable[str], after: bool = False) -> None:
        self.runtime, self.paths, self.after = runtime, tuple(paths), after

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
        """A forward hook, or a forward pre-hook that notes the counts before."""
        if torch.compiler.is_compiling():
            return
        rows = self.runtime.tally.rows()
        counts = {p: rows[p].dense + rows[p].hits.total() + rows[p].fallbacks.total() for p in self.paths if p in rows}
        if not self.after:
            self.runtime.before = counts  # type: ignore[attr-defined]
            return
        before = getattr(self.runtime, "before", {})
        missed = [p for p in self.paths if counts.get(p, 0) == before.get(p, 0)]
        if missed:
            raise ValueError(f"strict: the forward of {self.runtime.name} missed {', '.join(missed[:4])}")


def _sites(model: nn.Module, name: str) -> list[tuple[SiteName, nn.Module]]:
    """The modules that can be swapped, in the order of the layers."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "visattn_site"):
            raise ValueError(f"{name} is swapped already: call remove() on its handle before apply()")
        record = record_of(module)
        if record is not None:
            layer = path.rpartition(".")[0] if record.tokens else path
            found.append((SiteName(path, layer), module))
    if not found:
        known = ", ".join(sorted({kind.rpartition(".")[2] for kind in RECORDS}))
        grids = any(hasattr(module, "partition_block") for module in model.modules())
        why = "; its grid attention sees a few tokens of the whole map already" if grids else ""
        raise ValueError(f"{name} has no attention module that visattn can swap (it knows {known} of timm){why}")
    return found


def _check(module: nn.Module, pattern: Pattern, name: str) -> None:
    record = record_of(module)
    assert record is not None
    check_dims(pattern, 2, name)
    holder: Any = getattr(module, record.attention) if record.attention else module
    if record.bias and not isinstance(pattern, Neighborhood | Dense) and _has_bias(holder):
        raise ValueError(
            f"{pattern} cannot carry the relative position bias of {name}: use na(window=...), which can, or 'dense'"
        )
    if pattern.composed and getattr(holder, "use_rel_pos", False):
        raise ValueError(
            f"{pattern} has no pairs of tokens to which the position logits of {name} could be added: use a pattern "
            "that has, like na(window=...), or 'dense'"
        )
    if record.mixin is SamBlock and getattr(module, "window_size", 0) and getattr(holder, "rope", None) is not None:
        raise ValueError(
            f"the rotary embedding of {name} is one of its windows, not of the map: leave them as they are"
        )


def _has_bias(holder: Any) -> bool:
    table = getattr(holder, "relative_position_bias_table", None)
    return table is not None or hasattr(holder, "cpb_mlp") or getattr(holder, "rel_pos", None) is not None
