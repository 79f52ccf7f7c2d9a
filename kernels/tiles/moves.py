"""Moves between the rows of tokens and the batched problems of the tile engine."""

from __future__ import annotations

import torch

from visattn.kernels.tiles.groups import Group
from visattn.operands import wide_dtype


class Shapes:
    """Moves tokens between rows [tokens, H * D] and problems [n, Hkv, (H / Hkv) T, D]."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        self.heads, self.kv_heads, self.dim = q.shape[2], k.shape[2], q.shape[3]
        self.each = self.heads // self.kv_heads
        self.wide = wide_dtype(q)

    def queries(self, rows: torch.Tensor, slots: int) -> torch.Tensor:
        """Rows [n * T, H * D] or [n * T, H] as problems."""
        x = rows.view(-1, slots, self.kv_heads, self.each, rows.shape[1] // self.heads)
        if self.each == 1:
            return x[:, :, :, 0].transpose(1, 2)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def query_rows(self, x: torch.Tensor, slots: int) -> torch.Tensor:
        """Inverse of `queries`."""
        if self.each == 1:
            return x.transpose(1, 2).reshape(-1, self.heads * x.shape[3])
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
            added = self._table(rpb, group)
            bias = added if bias is None else bias + added
        hidden = None if visible is None else ~visible.any(-1)[:, None]
        if hidden is not None:
            hidden = self._per_head_group(hidden[..., None])[..., 0] if hidden.any() else None
        return None if bias is None else self._per_head_group(bias), hidden

    def position_bias(self, rpb: torch.Tensor, group: Group) -> torch.Tensor:
        """The relative position bias [H, ...] of the pairs of a group's problems: [1, Hkv, (H / Hkv) T, L]."""
        return self._per_head_group(self._table(rpb, group))

    def _table(self, rpb: torch.Tensor, group: Group) -> torch.Tensor:
        """The same for each head: [1, H, T, L]."""
        return torch.nn.functional.pad(rpb.flatten(1).to(self.wide), (0, 1))[:, group.rpb_index][None]

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
        buffer, number = self.store.get(name), index.shape[0]
        held = 0 if buffer is None else buffer.shape[0]
        if buffer is None or held < number:
            buffer, held = rows.new_empty(number, rows.shape[1]), number
            self.store[name] = buffer
        return torch.index_select(rows, 0, index, out=buffer if held == number else buffer[:number])


def accumulate(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows to those of `total` that `index` names; the order is always the same, so the result is."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
