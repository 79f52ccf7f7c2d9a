"""Patterns as names of attention implementations, for people who load models by name."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch

from visattn.attend import attention
from visattn.clients.transformers.grids import frames, pair, video
from visattn.clients.transformers.interface import BEGIN, Own, register_function, stock
from visattn.clients.transformers.records import RECORDS, Record
from visattn.clients.transformers.site import run_stock, to_call
from visattn.dims import check_dims
from visattn.dispatch import load
from visattn.layout import Layout
from visattn.patterns import MergingPattern, Pattern, parse
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity

# What transformers looks for in names, and takes for something else.
TAKEN = ("/", "flash", "sdpa", "flex_attention", "paged|")


def register(pattern: Pattern | str, *, backend: str = "auto") -> str:
    """Give transformers a name for a pattern: `from_pretrained(..., attn_implementation=visattn.register("na(...)"))`.

    The vision towers of the table in docs/transformers.md run it, wherever the length of their sequence is that of an
    image of the size in their configuration, or of a square one. All other modules of the model, its text tower among
    them, keep torch's dense attention. What cannot run the pattern warns once, with the reason. `visattn.apply` does
    more: it follows images of any size, has a report, and ends.

    Args:
        pattern: A pattern or its text, without learnable parameters.
        backend: "auto" or the name of a backend.

    Returns:
        The name, like "visattn:na(window=9x9)". Registering it again does nothing.

    Raises:
        ValueError: If the pattern cannot be told by a name.
        ModuleNotFoundError: If transformers is not installed.
    """
    if not isinstance(backend, str) or backend != "auto":
        load(backend)
    found = parse(pattern)
    if found.learnable or isinstance(found, MergingPattern):
        raise ValueError(f"{found} has parameters that nobody would keep: use visattn.apply(model, {str(found)!r})")
    name = f"{BEGIN}{found}" + f" on {backend}" * (backend != "auto")
    if any(part in name for part in TAKEN):
        raise ValueError(f"{name!r} means something else to transformers: use visattn.apply(model, {str(found)!r})")
    register_function(name, Named(found, backend), "sdpa")
    return name


class Named:
    """The attention function of such a name.

    Args:
        pattern: The pattern.
        backend: "auto" or the name of a backend.
    """

    def __init__(self, pattern: Pattern, backend: str) -> None:
        self.pattern, self.backend = pattern, backend
        self._warned: set[str] = set()

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See transformers' `AttentionInterface`: q, k, v [B, H, S, D]; out [B, S, H, D]."""
        own = Own(stock("sdpa", module), module, (query, key, value), attention_mask, options)
        record = _record(type(module))
        if record is None or not _sees(module.config):
            return own(), None
        call = to_call(own).autocast()
        layout = _layout(record, module, query.shape[2])
        fits = self._fit(call, layout)
        if isinstance(fits, str):
            self._warn(f"{type(module).__name__} ran dense attention instead of {self.pattern}: {fits}")
            return run_stock(call), None
        assert isinstance(layout, Layout)
        out = attention(*call.tensors, self.pattern, layout, scale=call.scale, key_mask=fits[0], backend=self.backend)
        return out, None

    def _fit(self, call: AttentionCall, layout: Layout | str) -> tuple[torch.Tensor | None] | str:
        """The valid keys of a call, or why it cannot run the pattern."""
        why = layout if isinstance(layout, str) else call.refusal()
        if why or isinstance(call.layouts, str):
            return why or str(call.layouts)
        assert isinstance(layout, Layout)
        check_dims(self.pattern, layout.dims, "the model")
        if call.mask is not None and torch.compiler.is_compiling():
            return "compiled code does not see what a mask hides"
        keys = key_validity(call.mask, call.q, None)
        if isinstance(keys, torch.Tensor) and keys.dtype != torch.bool:
            return "its mask is a bias"
        return keys if isinstance(keys, str) else (keys,)

    def _warn(self, text: str) -> None:
        if text not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(text)
            warnings.warn(text, stacklevel=4)


@functools.lru_cache(maxsize=256)
def _record(kind: type) -> Record | None:
    """The record of a tower by the class of an attention module, None for a class that no tower has."""
    return next((record for record in RECORDS if record.has_attention(kind)), None)


def _sees(config: Any) -> bool:
    """Whether a configuration is of something that sees: text towers can have the same attention class."""
    return any(hasattr(config, name) for name in ("patch_size", "patch_sizes", "tubelet_size", "patch_stride"))


def _layout(record: Record, module: Any, length: int) -> Layout | str:
    """Where a sequence of so many tokens sits, by the configuration of a module alone."""
    config = module.config
    if record.refused:
        return record.refused
    told = not hasattr(config, "image_size") and not hasattr(config, "crop_size")
    if told or record.reader is frames or record.told is not None:
        return "its configuration does not tell where its tokens sit: use visattn.apply"
    prefix, suffix = record.counts(config)
    tokens = length - prefix - suffix
    known = _known_grid(config, record.reader is video)
    if math.prod(known) == tokens:
        return Layout(known, prefix, suffix)
    side = math.isqrt(max(tokens, 0))
    if len(known) == 2 and side and side * side == tokens:
        return Layout((side, side), prefix, suffix)
    return f"{length} tokens are no image of the size in its configuration and no square one: use visattn.apply"


def _known_grid(config: Any, of_video: bool) -> tuple[int, ...]:
    """Tokens per axis of an image of the size in a configuration."""
    size = getattr(config, "image_size", None) or config.crop_size
    patch = getattr(config, "patch_size", None) or config.tubelet_size
    sides = tuple(n // p for n, p in zip(pair(size), pair(patch), strict=True))
    if not of_video:
        return sides
    tubelet = config.tubelet_size
    count = getattr(config, "num_frames", None) or config.frames_per_clip
    return (count // (tubelet[0] if isinstance(tubelet, list | tuple) else tubelet), *sides)
