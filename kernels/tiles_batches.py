"""Groups of problems cut in batches that stay in the cache, and the moves between tokens and problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from visattn.kernels.tiles_groups import Group

# Gathered keys and values of one batch of problems, in bytes: they should stay in a CPU's last-level cache.
BATCH_BYTES = {"cpu": 4 * 2**20}
BATCH_BYTES_ELSEWHERE = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Work:
    """Everything about a call besides its floating-point tensors.

    Attributes:
        groups: The problems.
        scale: Factor on the scores.
        key_mask: bool [B, keys], or None.
    """

    groups: Sequence[Group]
    scale: float
    key_mask: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Problems of one group that run together.

    Attributes:
        group: Their group.
        samples: The samples they belong to where `keys` is None.
        queries: Rows of q [B * S] of every slot: [problems * T].
        target: Rows of the result [B * S + 1]; empty slots go to the last one: [problems * T].
        keys: Rows of k and v [B * N]: [problems * L], or None for the leading ones of each sample.
        bias: Added to the scores: [1 or problems, 1 or Hkv, 1 or (H / Hkv) T, L], or None.
        hidden: Rows that see no key: bool [1 or problems, 1, 1 or (H / Hkv) T], or None where there is none.
    """

    group: Group
    samples: slice
    queries: torch.Tensor
    target: torch.Tensor
    keys: torch.Tensor | None
    bias: torch.Tensor | None
    hidden: torch.Tensor | None


def batch_size(keys: int, row: int, device: str) -> int:
    """Problems of so many keys that run together, where a key and its value have `row` bytes."""
    return max(1, BATCH_BYTES.get(device, BATCH_BYTES_ELSEWHERE) // (max(1, keys) * row))


def batches(work: Work, q: torch.Tensor, k: torch.Tensor, rpb: torch.Tensor | None, shapes: Shapes) -> Iterator[Batch]:
    """Cut all groups in batches of problems.

    Args:
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        rpb: Relative position bias, or None.
        shapes: Moves between tokens and problems.
    """
    for group in work.groups:
        problems = q.shape[0] * len(group.queries)
        size = batch_size(group.length, 2 * k.shape[2] * k.shape[3] * k.element_size(), q.device.type)
        bias = hidden = None
        alike = work.key_mask is None and group.mask is None and not group.short_keys
        if alike:
            bias, hidden = shapes.bias(group.visible(None), rpb, group)
        for start in range(0, problems, size):
            problem = torch.arange(start, min(start + size, problems), device=q.device)
            sample, tile = problem // len(group.queries), problem % len(group.queries)
            queries, keys = group.queries[tile], group.keys(sample, tile)
            target = queries + sample[:, None] * q.shape[1]
            if group.short_queries:
                target = torch.where(queries < 0, q.shape[0] * q.shape[1], target)
                queries = queries.clamp(min=0)
            visible = None if alike else group.visible(tile)
            if keys is not None:
                if group.short_keys:
                    visible = _and(visible, keys >= 0)
                keys = (keys.clamp(min=0) + sample[:, None] * k.shape[1]).flatten()
            if work.key_mask is not None:
                shown = work.key_mask[sample, : group.length] if keys is None else work.key_mask.flatten()[keys]
                visible = _and(visible, shown.view(-1, group.length))
            if not alike:
                bias, hidden = shapes.bias(visible, rpb, group)
            yield Batch(
                group=group,
                samples=slice(start, start + len(problem)),
                queries=(queries + sample[:, None] * q.shape[1]).flatten(),
                target=target.flatten(),
                keys=keys,
                bias=bias,
                hidden=hidden,
            )


def _and(visible: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """Visibility [1 or n, T, L] without the keys that are not there [n, L]."""
    return keys[:, None] if visible is None else visible & keys[:, None]


class Shapes:
    """Moves tokens between rows [tokens, H * D] and problems [n, Hkv, (H / Hkv) T, D]."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.heads, self.kv_heads, self.dim = q.shape[2], k.shape[2], q.shape[3]
        self.each = self.heads // self.kv_heads
        self.wide = torch.promote_types(q.dtype, torch.float32)

    def queries(self, rows: torch.Tensor, slots: int) -> torch.Tensor:
        """Rows [n * T, H * D] or [n * T, H] as problems."""
        x = rows.view(-1, slots, self.kv_heads, self.each, rows.shape[1] // self.heads)
        if self.each == 1:
            return x[:, :, :, 0].transpose(1, 2)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def query_rows(self, x: torch.Tensor, slots: int) -> torch.Tensor:
        """Inverse of `queries`."""
        return x.unflatten(2, (self.each, slots)).permute(0, 3, 1, 2, 4).reshape(-1, self.heads * x.shape[-1])

    def keys(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """Rows [n * L, Hkv * D] as problems."""
        return rows.view(-1, length, self.kv_heads, self.dim).transpose(1, 2)

    def bias(
        self, visible: torch.Tensor | None, rpb: torch.Tensor | None, group: Group
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Additive bias and rows without any key, as in `Batch`.

        Args:
            visible: bool [1 or n, 1 or T, L], or None where all keys are visible.
            rpb: Relative position bias [H, ...], or None.
            group: The problems.
        """
        bias = None
        if visible is not None:
            zero = torch.zeros((), dtype=self.wide, device=visible.device)
            bias = torch.where(visible, zero, float("-inf"))[:, None]
        if rpb is not None and group.rpb_index is not None:
            added = torch.nn.functional.pad(rpb.flatten(1).to(self.wide), (0, 1))[:, group.rpb_index][None]
            bias = added if bias is None else bias + added
        hidden = None if visible is None else ~visible.any(-1)[:, None]
        if hidden is not None:
            hidden = self._per_head_group(hidden[..., None])[..., 0] if hidden.any() else None
        return None if bias is None else self._per_head_group(bias), hidden

    def _per_head_group(self, x: torch.Tensor) -> torch.Tensor:
        """[1 or n, 1 or H, 1 or T, L] for queries in problems: [1 or n, 1 or Hkv, 1 or (H / Hkv) T, L]."""
        if self.each == 1 or (x.shape[1] == 1 and x.shape[2] == 1):
            return x
        if x.shape[1] == 1:
            return x.repeat(1, 1, self.each, 1)
        return x.reshape(x.shape[0], self.kv_heads, -1, x.shape[3])


class Buffers:
    """Memory for gathered rows, reused from batch to batch: fresh pages cost as much as the gather itself."""

    def __init__(self) -> None:
        self.store: dict[str, torch.Tensor] = {}

    def gather(self, name: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """rows[index], valid until the next gather of that name."""
        buffer = self.store.get(name)
        if buffer is None or len(buffer) < len(index):
            buffer = self.store[name] = rows.new_empty(len(index), rows.shape[1])
        return torch.index_select(rows, 0, index, out=buffer[: len(index)])
