"""Lists that q and k choose: whole key tiles are moved at a time, of tokens in the order of their tiles.

Keys and values of a tile lie side by side in a table of tiles, so that a key of a list costs a part of one long copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from visattn.kernels.tiles import fused as kernels
from visattn.kernels.tiles.batches import Work, batch_size
from visattn.kernels.tiles.groups import Group
from visattn.kernels.tiles.moves import Buffers, Shapes, accumulate

# Whole tiles are moved so fast that a batch of this many times the keys of one of single rows is cheaper.
MORE = 2


class Places(NamedTuple):
    """Tokens of tiles, for each group of heads that has lists of its own.

    Attributes:
        rows: Row of each slot among the rows [B * S * G, channels] of one group of heads each, of an empty slot that of
            some token: [B * G * tiles * T].
        empty: Empty slots: bool [B * G * tiles * T], None where there is none.
        slots: Slots of a tile, T.
        groups: Groups of heads, G.
    """

    rows: torch.Tensor
    empty: torch.Tensor | None
    slots: int
    groups: int

    @classmethod
    def of(cls, tokens: torch.Tensor, groups: int, like: torch.Tensor, short: bool) -> Places:
        """Places of the tokens of tiles [tiles, T] in tensors [B, S, ...]; -1 is an empty slot, if there is any."""
        samples, length = like.shape[:2]
        sample, group = (torch.arange(n, device=tokens.device) for n in (samples, groups))
        first = (sample[:, None] * (length * groups) + group)[..., None, None]
        rows = (tokens.clamp(min=0) if short else tokens) * groups + first
        empty = (tokens < 0).expand(rows.shape).flatten() if short else None
        return cls(rows.flatten(), empty, tokens.shape[1], groups)

    def per_group(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, S, heads, ...] as rows [B * S * G, channels of a group]."""
        return x.reshape(x.shape[0] * x.shape[1] * self.groups, -1)

    def pairs(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Two tensors as one of tiles, token by token: [B * G * tiles, T * 2 * channels]."""
        rows = [self.per_group(t) for t in (x, y)]
        both = rows[0].new_empty(len(self.rows), 2, rows[0].shape[1])
        for i, own in enumerate(rows):
            torch.index_select(own, 0, self.rows, out=both[:, i])
        return both.view(-1, self.slots * 2 * both.shape[2])


class Run(NamedTuple):
    """Problems that run together.

    Attributes:
        queries: Row of each slot of the query tiles, of one group of heads: [n * T].
        target: The same of the results; the row behind the last takes what is in empty slots.
        empty: Empty slots: bool [n * T, 1], None where there is none.
        keys: Tiles of the table of keys, [n * tiles of a problem].
        length: Keys of a problem; what is behind them in its tiles is no key.
        bias: Added to the scores: [n, 1, 1 or (H / Hkv) T, keys], or None.
        hidden: Rows that see no key: bool [n, 1, 1 or (H / Hkv) T], None where there is none.
    """

    queries: torch.Tensor
    target: torch.Tensor
    empty: torch.Tensor | None
    keys: torch.Tensor
    length: int
    bias: torch.Tensor | None
    hidden: torch.Tensor | None


class Routed:
    """The problems of a routed group as tiles of a call's tensors.

    Args:
        group: The problems.
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
    """

    def __init__(self, group: Group, work: Work, q: torch.Tensor, k: torch.Tensor) -> None:
        assert group.key_tiles is not None and group.tile_tokens is not None, "only lists are routed"
        self._group, self._listed, tokens = group, group.key_tiles, group.tile_tokens
        groups = work.heads.groups
        key_groups = min(groups, work.heads.kv_heads)
        self.shapes = Shapes(q[:, :, : q.shape[2] // groups], k[:, :, : k.shape[2] // key_groups])
        self._row = 2 * self.shapes.kv_heads * k.shape[3] * k.element_size()
        self._fixed = 0 if group.fixed is None else len(group.fixed)
        if group.fixed is not None:
            behind = torch.nn.functional.pad(group.fixed, (0, -self._fixed % tokens.shape[1]), value=-1)
            tokens = torch.cat([tokens, behind.view(-1, tokens.shape[1])])
        self._behind = q.shape[0] * q.shape[1] * groups
        self.queries = Places.of(group.queries, groups, q, group.short_queries)
        # Tiles of dense tokens, which no list names, have empty slots too.
        self.keys = Places.of(tokens, key_groups, k, bool((tokens < 0).any()))
        self._rows = self._table_rows(len(group.queries) * (groups // key_groups), len(tokens))
        self._weights = self._key_weights(work.key_mask)

    def _table_rows(self, sharing: int, tiles: int) -> torch.Tensor:
        """Rows of the table of keys that each problem sees, listed tiles first: [problems, m and the fixed ones].

        Args:
            sharing: Problems that share the keys of a sample and group of heads.
            tiles: Tiles of those, the fixed ones last.
        """
        listed = self._listed
        behind = torch.arange(tiles - -(-self._fixed // self.keys.slots), tiles, device=listed.device)
        rows = torch.cat([listed, behind.to(listed.dtype).expand(len(listed), -1)], 1) if len(behind) else listed
        return rows + (torch.arange(len(listed), device=listed.device) // sharing * tiles)[:, None]

    def _key_weights(self, key_mask: torch.Tensor | None) -> torch.Tensor | None:
        """0 for the keys of the table that may be seen, else -inf: [B * tiles, T]; None if a list has no such key."""
        if key_mask is None and not self._group.short_keys:
            return None
        hidden = torch.zeros_like(self.keys.rows, dtype=torch.bool) if self.keys.empty is None else self.keys.empty
        if key_mask is not None:
            hidden = hidden | ~key_mask.flatten()[self.keys.rows // self.keys.groups]
        zero = torch.zeros((), dtype=self.shapes.wide, device=hidden.device)
        return torch.where(hidden, float("-inf"), zero).view(-1, self.keys.slots)

    def runs(self) -> Iterator[Run]:
        """All problems in batches that stay in the cache, the longest lists first."""
        counts, number = self._group.counts, self._listed.shape[1]
        problems = len(self._listed)
        if counts is None:
            size = self._together(number)
            for start in range(0, problems, size):
                some = slice(start, min(start + size, problems))
                yield self._run(some, some.stop - start, number, None)
            return
        order = counts.sort(descending=True, stable=True).indices
        # Batches are made on the host.
        lengths, start = counts[order].tolist(), 0
        while start < problems:
            # A batch without any key still has results.
            number = max(1, lengths[start])
            stop = min(start + self._together(number), problems)
            index = order[start:stop]
            yield self._run(index, stop - start, number, None if lengths[stop - 1] == number else counts[index])
            start = stop

    def _together(self, number: int) -> int:
        """Problems of so many listed tiles that run together."""
        return MORE * batch_size(number * self.keys.slots + self._fixed, self._row, self._listed.device.type)

    def _run(self, queries: slice | torch.Tensor, count: int, number: int, counts: torch.Tensor | None) -> Run:
        """A run of `count` problems with `number` listed tiles, of which `counts` count."""
        group, slots, rows = self._group, self.keys.slots, self._rows[queries]
        most = self._listed.shape[1]
        if number < most:
            rows = torch.cat([rows[:, :number], rows[:, most:]], 1)
        keys, listed = rows.flatten(), number * slots
        length, bias = listed + self._fixed, None
        if self._weights is not None:
            bias = self._weights.index_select(0, keys).view(count, -1)[:, :length]
        elif counts is not None or group.rest is not None:
            bias = torch.zeros(count, length, dtype=self.shapes.wide, device=keys.device)
        places, by_rows = (*self._slots(queries), keys, length), group.rows_see(queries, number)
        if bias is None and by_rows is None:
            return Run(*places, None, None)
        if bias is None:
            bias = torch.zeros(count, length, dtype=self.shapes.wide, device=keys.device)
        if counts is not None:
            behind = torch.arange(number, device=keys.device) >= counts[:, None]
            bias[:, :listed].unflatten(1, (number, slots)).masked_fill_(behind[..., None], float("-inf"))
        if group.rest is not None:
            bias[:, length - group.rest.shape[1] :] += group.rest[queries]
        bias = bias[:, None]
        if by_rows is not None:
            bias = self._by_rows(bias, by_rows)
        hidden = None
        if self._weights is not None or counts is not None or by_rows is not None:
            # A list of full tiles alone always has a key.
            none = (bias == float("-inf")).all(2)[:, None]
            hidden = none if none.any() else None
        return Run(*places, bias[:, None], hidden)

    def _by_rows(self, bias: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, -inf where a row does not see a token of a listed tile: [n, rows, keys].

        Args:
            bias: The same for all rows: [n, 1, keys].
            seen: bool [n, T, tokens of the listed tiles].
        """
        own = bias.expand(-1, seen.shape[1], -1).clone()
        own[:, :, : seen.shape[2]].masked_fill_(~seen, float("-inf"))
        return own.repeat(1, self.shapes.each, 1) if self.shapes.each > 1 else own

    def _slots(self, queries: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`queries`, `target` and `empty` of the run of some problems."""
        rows, empty = self.queries.rows.view(-1, self.queries.slots)[queries].flatten(), self.queries.empty
        if empty is None:
            return rows, rows, None
        empty = empty.view(-1, self.queries.slots)[queries].flatten()
        return rows, rows.masked_fill(empty, self._behind), empty[:, None]

    def queries_of(self, rows: torch.Tensor, run: Run, buffers: Buffers, name: str, seen: bool = True) -> torch.Tensor:
        """Queries of a run as problems [n, Hkv, (H / Hkv) T, channels of a head].

        Args:
            rows: Of each group of heads of each token.
            run: The run.
            buffers: Where they are put.
            name: Of the buffer.
            seen: Whether what empty slots repeat stays; otherwise they are zero.
        """
        own = buffers.gather(name, rows, run.queries)
        if not seen and run.empty is not None:
            own.masked_fill_(run.empty, 0)
        return self.shapes.queries(own, self.queries.slots)

    def put(self, total: torch.Tensor, run: Run, own: torch.Tensor) -> None:
        """Copy results of a run [n, Hkv, (H / Hkv) T, channels of a head] to the rows of all [B * S + 1, channels]."""
        rows = self.shapes.query_rows(own, self.queries.slots)
        total.view(-1, rows.shape[1]).index_copy_(0, run.target, rows.to(total.dtype))

    def pairs_of(self, table: torch.Tensor, run: Run, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run as problems [n, Hkv, L, D] each, from their table of pairs."""
        rows = buffers.gather("pairs", table, run.keys).view(
            self._number(run), -1, 2, self.shapes.kv_heads, self.shapes.dim
        )
        keys, values = (side.transpose(1, 2)[:, :, : run.length] for side in rows.unbind(2))
        return keys, values

    def _number(self, run: Run) -> int:
        """Problems of a run."""
        return len(run.keys) // -(-run.length // self.keys.slots)

    def add(self, total: torch.Tensor, run: Run, own: torch.Tensor) -> None:
        """Add gradients of keys [n, Hkv, L, D] to those of the table of keys."""
        rows = own.transpose(1, 2).flatten(2).to(total.dtype)
        behind = -run.length % self.keys.slots
        rows = torch.nn.functional.pad(rows, (0, 0, 0, behind)) if behind else rows
        accumulate(total, run.keys, rows.reshape(-1, total.shape[1]))


def forward(
    group: Group,
    work: Work,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Compute the problems of a routed group.

    Args:
        group: The problems.
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        v: Values [B, N, Hkv, D].
        out: Rows of all queries and one more, which take the output: [B * S + 1, H * D].
        lse: Rows that take the log-sum-exp [B * S + 1, H], or None.
    """
    routed, buffers = Routed(group, work, q, k), Buffers()
    queries, pairs = routed.queries.per_group(q), routed.keys.pairs(k, v)
    for run in routed.runs():
        problems = routed.queries_of(queries, run, buffers, "q")
        own_keys, own_values = routed.pairs_of(pairs, run, buffers)
        own, own_lse = kernels.forward(problems, own_keys, own_values, run.bias, work.scale)
        if run.hidden is not None:
            own = own.masked_fill(run.hidden[..., None], 0)
            own_lse = own_lse.masked_fill(run.hidden, float("-inf"))
        routed.put(out, run, own)
        if lse is not None:
            routed.put(lse, run, own_lse[..., None])


class Totals(NamedTuple):
    """Where gradients are collected.

    Attributes:
        q: Rows of all queries and one more: [B * S + 1, H * D].
        k: Rows of all keys, float32 at least: [B * N, Hkv * D].
        v: The same of values.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def backward(
    group: Group,
    work: Work,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    per_query: dict[str, torch.Tensor],
    totals: Totals,
) -> None:
    """Add the gradients of the problems of a routed group.

    Args:
        group: The problems.
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        v: Values [B, N, Hkv, D].
        per_query: Rows of all queries [B * S, ...]: `q`, `grad`, `out`, `lse` (finite) and perhaps `grad_lse`.
        totals: Where to add; rows of queries are put.
    """
    routed, buffers = Routed(group, work, q, k), Buffers()
    rows = {name: routed.queries.per_group(whole[None]) for name, whole in per_query.items()}
    pairs = routed.keys.pairs(k, v)
    dk, dv = (pairs.new_zeros(len(pairs), pairs.shape[1] // 2, dtype=routed.shapes.wide) for _ in range(2))
    for run in routed.runs():
        # An empty slot repeats some token: without a gradient of its own it adds nothing to the keys'.
        mine = {
            name: routed.queries_of(own, run, buffers, name, name not in ("grad", "grad_lse"))
            for name, own in rows.items()
        }
        own_keys, own_values = routed.pairs_of(pairs, run, buffers)
        found = kernels.backward(
            mine["grad"],
            mine["grad_lse"][..., 0] if "grad_lse" in mine else None,
            mine["q"],
            own_keys,
            own_values,
            mine["out"],
            mine["lse"][..., 0],
            run.bias,
            work.scale,
            False,
        )
        routed.put(totals.q, run, found.q)
        routed.add(dk, run, found.k)
        routed.add(dv, run, found.v)
    for total, own in ((totals.k, dk), (totals.v, dv)):
        total = total.view(len(total) * routed.keys.groups, -1)
        accumulate(total, routed.keys.rows, own.view(-1, total.shape[1]))
