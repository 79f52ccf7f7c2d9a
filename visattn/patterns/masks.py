"""The truth of a pattern as a mask over all tokens, for small grids."""

from __future__ import annotations

from typing import Any

import torch

from visattn.given import real, said, tensor
from visattn.layout import Layout, check_layout
from visattn.patterns.base import Pattern
from visattn.patterns.kinds import ComposedPattern, PooledPattern, RoutedPattern, StaticPattern
from visattn.patterns.text import parse
from visattn.patterns.values import LARGEST_REAL


def check_defined(pattern: Pattern, layout: Layout) -> None:
    """Raise a ValueError if a pattern is not defined on the grid of a layout, or not for keys of their own."""
    if layout.key_layout is not None:
        if not isinstance(pattern, StaticPattern):
            raise ValueError(
                f"{pattern} is for self-attention, and the layout is {layout}: only patterns that are a mask known "
                "from the grids (na, clear, halo, dense) take a key_layout"
            )
        if len(layout.grids) > 1 and not pattern.two_grids:
            raise ValueError(
                f"{pattern} has no meaning for queries and keys on different grids ({layout}): use na, clear, halo or "
                "dense, or the same grid for both"
            )
    pattern.check(*layout.grids)


def dense_mask(pattern: Pattern | str, layout: Layout) -> torch.Tensor:
    """The truth of a pattern as a mask over all tokens, for small grids.

    Args:
        pattern: A pattern or its text.
        layout: Where the tokens sit.

    Returns:
        bool [S, N + extra] with S = layout.length queries and N = layout.keys.length keys (the same tokens unless the
        layout has a key_layout); entry (i, j) says whether query i sees key j. The extra keys
        are those that the pattern appends (the pooled keys of clear), which dense tokens do not see. The mask of a
        composition around another pattern is that of the other.

    Raises:
        ValueError: If the pattern is not defined on the grid, or has no mask that is known without q and k.
    """
    pattern = parse(pattern)
    check_layout(layout)
    check_defined(pattern, layout)
    shown = pattern.inner or pattern if isinstance(pattern, ComposedPattern) else pattern
    if isinstance(shown, RoutedPattern):
        raise ValueError(f"the mask of {shown} depends on q and k: call routed_mask(pattern, layout, q, k)")
    if not isinstance(shown, StaticPattern):
        assert isinstance(shown, ComposedPattern)
        what = shown.instead(layout.grid)
        raise ValueError(f"{shown} has no mask: every token reads every other, as it is {what}")
    keys = layout.keys
    extra = shown.extra_keys(keys.grid) if isinstance(shown, PooledPattern) else 0
    mask = torch.ones(layout.length, keys.length + extra, dtype=torch.bool, device="cpu")
    mask[:, keys.length :] = False
    inner, inner_keys = (slice(side.prefix, side.prefix + side.tokens) for side in (layout, keys))
    mask[inner, keys.length :] = True
    mask[inner, inner_keys] = torch.from_numpy(shown.grid_mask(*layout.grids))
    if not shown.dense_pairs:
        outer, outer_keys = (torch.ones(n, dtype=torch.bool, device="cpu") for n in mask.shape)
        outer[inner], outer_keys[inner_keys] = False, False
        mask &= ~(outer[:, None] & outer_keys)
    return mask


def routed_mask(
    pattern: Pattern,
    layout: Layout,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The truth of a routed pattern as a mask over all tokens, for small grids.

    Args:
        pattern: A routed pattern.
        layout: The tokens.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        key_mask: bool [B, S], True where a token is valid: the others take no part in the choice.
        scale: Factor on the logits, D**-0.5 if None.

    Returns:
        bool [B, S, S], without the key mask itself; entry (b, i, j) says whether query i of sample b sees key j. Of
        patterns whose heads choose for themselves (topk, topp, above) [B, H, S, S].

    Raises:
        ValueError: If the pattern is not routed, or the arguments do not fit together.
    """
    pattern = parse(pattern)
    if not isinstance(pattern, RoutedPattern):
        raise ValueError(f"{pattern} is not routed: call dense_mask(pattern, layout)")
    _check_inputs(pattern, layout, q, k, key_mask)
    if scale is not None:
        scale = real(scale, "scale", "one finite float32 number, or None for D**-0.5", lambda x: abs(x) <= LARGEST_REAL)
    own = pattern.routed_grid_mask(q, k, layout, key_mask, scale)
    mask = torch.ones(*own.shape[:-2], layout.length, layout.length, dtype=torch.bool, device=q.device)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    mask[..., inner, inner] = own
    return mask


def _check_inputs(pattern: Pattern, layout: Layout, q: Any, k: Any, key_mask: Any) -> None:
    """Raise a ValueError for what routes no queries and keys of a layout."""
    check_layout(layout)
    check_defined(pattern, layout)
    for name, given in (("q", q), ("k", k)):
        shape = list(tensor(given, name, "[B, S, heads, D]").shape)
        if len(shape) != 4 or shape[1] != layout.length:
            raise ValueError(f"{name} {shape} must be [B, S, heads, D] with the {layout.length} tokens of {layout}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in B and D, and k's heads divide q's")
    if key_mask is not None:
        found = tensor(key_mask, "key_mask", "[B, S]")
        if found.dtype != torch.bool or found.shape != k.shape[:2]:
            raise ValueError(f"key_mask={said(found)} of {found.dtype} must be torch.bool {list(k.shape[:2])}")
