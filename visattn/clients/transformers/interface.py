"""Names of attention implementations in transformers, and what runs under them.

A name stands for the implementation that a model had before it was patched: modules with a site run its pattern, all
others, those of copies and of text towers among them, run what they ran before. So a name stays when a patch goes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

# How the names begin.
BEGIN = "visattn:"

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Own(NamedTuple):
    """What the attention that a module had needs of a call.

    Attributes:
        attend: That attention.
        module: The module.
        tensors: Queries, keys and values [B, H, S, D].
        mask: As the model made it.
        options: Keyword arguments.
    """

    attend: Attend
    module: torch.nn.Module
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    mask: Any
    options: Mapping[str, Any]

    def __call__(self) -> torch.Tensor:
        """Attention [B, S, H, D]."""
        return self.attend(self.module, *self.tensors, self.mask, **self.options)[0]


class Under:
    """The attention function of a name.

    Args:
        previous: The implementation that it stands for.
    """

    def __init__(self, previous: str) -> None:
        self.previous = previous

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
        site = getattr(module, "visattn_site", None)
        if site is None:
            return stock(self.previous, module)(module, query, key, value, attention_mask, **options)
        own = Own(site.stock, module, (query, key, value), attention_mask, options)
        return site.attend(own), None


def stock(implementation: str | None, module: torch.nn.Module) -> Attend:
    """The attention function of an implementation for a module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation is None or implementation == "eager":
        return _eager(type(module))
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _eager(kind: type) -> Attend:
    """The function beside a class of modules that computes attention step by step."""
    for base in kind.__mro__:
        found = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{kind.__module__}.{kind.__qualname__} has no eager_attention_forward beside it")


def name_for(previous: str | None) -> str:
    """The name that stands for an implementation; registers it the first time."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    previous = previous or "eager"
    known = {name: found for name, found in ALL_ATTENTION_FUNCTIONS.items() if isinstance(found, Under)}
    for name, found in known.items():
        if found.previous == previous:
            return name
    # Not after the implementation: transformers looks for parts of names, like "flash".
    name = f"{BEGIN}{len(known)}"
    register_function(name, Under(previous), previous)
    return name


def is_ours(implementation: str | None) -> bool:
    """Whether a name is one of `name_for`; compiled code asks, too."""
    return implementation is not None and implementation.removeprefix(BEGIN).isdigit()


def register_function(name: str, attend: Callable[..., Any], masks_of: str) -> None:
    """Give an attention function a name, and the masks of an implementation: without them padding would be lost."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, attend)
    if masks_of in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])
