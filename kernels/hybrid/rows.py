"""The weights of tokens in a mix of two attentions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from visattn.operands import repeated
from visattn.patterns.choice.blocks import inner, token_blocks
from visattn.patterns.choice.tail import LEAST
from visattn.patterns.hybrid.parts import grid_of, mapped, of_tokens, valid_of
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.tailed import holding
from visattn.problem import Call


def hybrid_rows(
    q: torch.Tensor, k: torch.Tensor, call: Call, index: torch.Tensor, rows_of: Callable[[Call], torch.Tensor]
) -> torch.Tensor:
    """The rows [B, H, R, S] of some queries [R].

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        call: The call; its pattern is a hybrid one.
        index: Which queries.
        rows_of: Gives the rows of a call of a pattern that lists.

    Raises:
        ValueError: If a branch is no sum of weighted values.
    """
    pattern, layout = call.pattern, call.layout
    if not isinstance(pattern, SLA2) or pattern.soft:
        raise ValueError(f"{pattern} has no weight for each token: sla2 with hard lists has rows")
    at, blocks = inner(layout), pattern.blocks(layout.grid)
    given = q, k, layout, call.key_mask, call.scale, call.parameters
    choice = pattern.choose(*given)
    with holding(pattern.front, choice):
        soft = rows_of(replace(call, pattern=pattern.front, parameters={}))
    scores, seen = pattern.router_scores(*given)
    listed = choice.mask(0, blocks.columns)
    odds = pattern.odds(scores, seen, listed.to(scores.dtype), layout, call.key_mask)
    share = of_tokens(pattern.shares(odds, q, call.parameters, layout)[..., None], blocks)
    # Rows of dense tokens are those of some grid token, and not used.
    place = (index - layout.prefix).clamp(0, layout.tokens - 1)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    keys = repeated(mapped(grid_of(k, layout), pattern.feature), q.shape[2])
    weights = torch.einsum("brhf,bthf->bhrt", mapped(q[:, index], pattern.feature), keys)
    weights = weights.masked_fill(listed[:, :, rows[place]][..., columns], 0)
    valid = valid_of(call.key_mask, layout)
    weights = weights if valid is None else weights.masked_fill(~valid[:, None, None], 0)
    linear = weights / (LEAST + weights.sum(-1, keepdim=True))
    linear = torch.nn.functional.pad(linear, (layout.prefix, layout.suffix))
    mixed = linear + share[:, place].transpose(1, 2) * (soft - linear)
    return torch.where(((index >= at.start) & (index < at.stop))[:, None], mixed, soft)
