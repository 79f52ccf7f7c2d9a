"""How much of the exact attention falls on what a pattern lists, summed up over the calls of a model."""

from __future__ import annotations

import torch

from visattn.watch import Watched


class Caught:
    """A watcher that sums up the caught share of attention, module by module.

    Attributes:
        rows: Queries of the grid that are looked at in each call.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"caught={rows} must be how many queries of a call are looked at, at least 1")
        self.rows = rows
        self._sums: dict[str, list[torch.Tensor]] = {}

    def __call__(self, watched: Watched) -> None:
        """Look at a call; what is no list of tokens, or sees all, is left out."""
        for found in watched.caught(self.rows):
            new = torch.stack([found.sum(), found.new_tensor(found.numel()), found.min(), found.max()])
            self._sums.setdefault(watched.site, []).append(new)

    def of(self, site: str) -> tuple[float, float, float] | None:
        """Mean, least and largest caught share of a module over heads, samples and calls; None if it has none."""
        if site not in self._sums:
            return None
        # Waits for the device.
        found = torch.stack(self._sums[site])
        total, number = found[:, :2].sum(0).tolist()
        return total / number, found[:, 2].min().item(), found[:, 3].max().item()
