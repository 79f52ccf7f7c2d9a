"""Halo parallelism: own tiles are computed while border keys travel, border tiles after, merged by log-sum-exp."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from visattn.attend import attention
from visattn.autocast import switched_off
from visattn.dispatch import load
from visattn.parallel.agreed import check_agreed
from visattn.parallel.dense import share_dense
from visattn.parallel.exchange import Arrive, Exchange, Post, buffers
from visattn.parallel.merge import add_rows
from visattn.parallel.moved import Moved
from visattn.parallel.needs import Needs, check, halo_needs
from visattn.parallel.ranks import checked_rank, own_tensors
from visattn.parallel.slabs import Slabs
from visattn.patterns import Linear, Pattern, parse


def halo_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    slabs: Slabs,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
    moved: Moved | None = None,
) -> torch.Tensor:
    """Attention of a sequence that is cut in slabs over the ranks of a process group; every rank makes this call.

    A rank fetches the key rows outside of its slab that the pattern lists for its queries, and no others. The numbers
    are those of `attention` on the whole sequence up to rounding. Dense tokens (text) are on every rank: their queries
    see each rank's slab there, and the ranks' results are merged. Gradients are those of the sum of what the ranks
    compute from their results, each rank's with respect to its own tensors: those of dense tokens add up over ranks.

    Args:
        q: Queries [B, S, H, D] of this rank, S = slabs.local(rank).length: dense tokens and its slab.
        k: Keys [B, S, Hkv, D] of the same tokens.
        v: Values [B, S, Hkv, D].
        pattern: A pattern or its text: na (with stride, dilation, causal and circular axes), halo, clear without pooled
            keys, radial (cut along frames), dense, or linear without parameters, of which ranks exchange states: sums
            of features x channels, whatever the length (LASP-2).
        slabs: How the whole sequence is cut; one slab for each rank of the group.
        group: The process group, the default one if None.
        scale: Factor on the logits, D**-0.5 if None.
        key_mask: bool [B, S], True where a key of this rank may be attended; all ranks pass one or none does. Dense
            tokens' part must be the same on all.
        backend: As in `attention`.
        moved: Gets the bytes of this rank's messages in the forward pass added.

    Returns:
        Output [B, S, H, D].

    Raises:
        ValueError: If the pattern cannot run on slabs, or tensors, slabs and group do not fit together.
    """
    pattern = parse(pattern)
    rank = checked_rank(slabs, group)
    local = slabs.local(rank)
    q, k, v = own_tensors(q, k, v, local, key_mask, scale)
    check(pattern, slabs)
    check_agreed("halo_attention", (q, k, v), pattern, slabs, group, scale=scale, key_mask=key_mask is not None)
    with switched_off(q.device):
        if isinstance(pattern, Linear):
            linear: Any = load("linear")
            return linear.on_slabs(q, k, v, pattern, slabs, rank, group=group, key_mask=key_mask, moved=moved)
        run = partial(attention, scale=scale, backend=backend, return_lse=True)
        return _fetching(q, k, v, halo_needs(pattern, slabs, rank), group, run, key_mask, moved)


def _fetching(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    needs: Needs,
    group: dist.ProcessGroup | None,
    run: Any,
    key_mask: torch.Tensor | None,
    moved: Moved | None,
) -> torch.Tensor:
    """The output from keys of this rank and of others, which `run` attends to."""
    slabs, local = needs.slabs, needs.slabs.local(needs.rank)
    exchange = Exchange(needs, group)
    masks = _post_masks(needs, key_mask, group)
    token = Post.apply(exchange, k, v)
    result = run(q, k, v, needs.own, local, key_mask=key_mask)
    arrived: Any = Arrive.apply(exchange, token, result[0])
    if moved is not None:
        moved.add(*exchange.moved())
    messages = dict(zip(exchange.received, arrived[1:], strict=True))
    result = arrived[0], result[1]
    for border in needs.borders:
        border_k, border_v = buffers(border, exchange, messages, k, v)
        queries = _query_rows(q, needs, border.first_query, border.queries)
        seen = None if masks is None or key_mask is None else masks.of(border, key_mask)
        rows = run(queries, border_k, border_v, border.part, border.layout, key_mask=seen)
        result = add_rows(result, rows, local.grid, slabs.axis, border.first_query, local.prefix)
    if not slabs.dense or slabs.ranks == 1:
        return result[0]
    out, shared = share_dense(*result, local, group)
    if moved is not None:
        moved.add(shared=shared)
    return out


def _query_rows(q: torch.Tensor, needs: Needs, first: int, number: int) -> torch.Tensor:
    """Some rows of a rank's queries: [B, tokens, H, D]."""
    local, axis = needs.slabs.local(needs.rank), needs.slabs.axis
    grid = q[:, local.prefix : local.prefix + local.tokens].unflatten(1, local.grid)
    return grid.narrow(1 + axis, first, number).flatten(1, local.dims)


class _Masks:
    """Key masks of other ranks' rows."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def of(self, border: Any, own: torch.Tensor) -> torch.Tensor:
        """Which keys of a border may be attended: bool [B, tokens]."""
        self._exchange.wait()
        x = own.to(torch.uint8)[:, :, None, None]
        return buffers(border, self._exchange, self._exchange.received, x)[0][..., 0, 0].bool()


def _post_masks(needs: Needs, key_mask: torch.Tensor | None, group: dist.ProcessGroup | None) -> _Masks | None:
    if key_mask is None:
        return None
    exchange = Exchange(needs, group)
    x = key_mask.to(torch.uint8)[:, :, None, None]
    exchange.post(x)
    return _Masks(exchange)
