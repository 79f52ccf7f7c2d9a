"""`tile_choice()`: which tiles a pattern lists for some q and k."""

from __future__ import annotations

import torch

from visattn.checks import check_call, factor
from visattn.layout import Layout
from visattn.patterns import ListedPattern, Pattern, RoutedPattern, parse
from visattn.plans import plan


def tile_choice(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which key tiles each query tile of the grid lists: for tests, pictures and recall.

    Tiles are those of `plan(pattern, layout)`; of topk, topp and above they are the blocks, or parts of them where
    blocks have more than 64 tokens. Tiles of dense tokens (text) are always listed and not among them.

    Args:
        q: Queries [B, S, H, D] with S = layout.length.
        k: Keys [B, S, Hkv, D].
        pattern: A pattern or its text, which is a list of tiles.
        layout: Where the tokens sit.
        scale: Factor on the logits, D**-0.5 if None.
        key_mask: bool [B, S], True where a key may be attended.

    Returns:
        bool [B, G, query tiles, key tiles] with G the heads that choose for themselves: the query heads, or 1 where all
        share one choice. B is 1 for a pattern that the grid alone decides.

    Raises:
        ValueError: If the arguments do not fit together, or the pattern is no list of tiles.
    """
    pattern = parse(pattern)
    check_call(q, k, k, pattern, layout, key_mask, None)
    scale = factor(scale, q.shape[3])
    if not isinstance(pattern, ListedPattern):
        raise ValueError(f"{pattern} is a composition and no list of tiles: it chooses none")
    made = plan(pattern, layout)
    first, tiles = made.keys.grid_tiles.start, made.keys.runs[1]
    if isinstance(pattern, RoutedPattern):
        return pattern.route(q, k, made, key_mask, scale).mask(first, tiles)
    mask = torch.zeros(made.queries.tiles, made.keys.tiles, dtype=torch.bool, device="cpu")
    mask[torch.from_numpy(made.lists.rows), torch.from_numpy(made.lists.tile)] = True
    return mask[made.queries.grid_tiles, made.keys.grid_tiles][None, None].to(q.device)
