"""What a handle shows of the attention calls of its model while they run: for losses and for looking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.patterns.choice.stratified import sampled_rows


class Watched(NamedTuple):
    """One attention call of a patched module, with gradients where they flow.

    Attributes:
        site: Path of the module.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        out: What the call returned [B, S, H, D]; changed in place without gradients, the model goes on with the change.
        pattern: What it ran: the module's pattern, or dense where a schedule keeps it dense.
        layouts: Where the tokens sit; one for each sample where samples differ.
        scale: Factor on the logits.
        key_mask: bool [B, S], True where a key may be attended, or None for all.
        parameters: Learnable parameters of the pattern.
        step: Index of the denoising step, None where nothing that was applied asks for it.
    """

    site: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    pattern: Pattern
    layouts: tuple[Layout, ...]
    scale: float
    key_mask: torch.Tensor | None
    parameters: Mapping[str, torch.Tensor]
    step: int | None = None

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights of all tokens for the queries of some tokens [R], see `visattn.attention_rows`: [B, H, R, S]."""
        from visattn.kernels.rows import attention_rows

        alone = len(self.layouts) == 1
        samples = [slice(None) if alone else slice(i, i + 1) for i in range(len(self.layouts))]
        return torch.cat(
            [
                attention_rows(
                    self.q[at],
                    self.k[at],
                    self.pattern,
                    layout,
                    rows,
                    parameters=self.parameters,
                    scale=self.scale,
                    key_mask=None if self.key_mask is None else self.key_mask[at],
                )
                for at, layout in zip(samples, self.layouts, strict=True)
            ]
        )

    def sampled(self, number: int) -> torch.Tensor:
        """At most so many tokens of the first layout's grid, spread over all of its axes [R]."""
        return sampled_rows(self.layouts[0], number, self.q.device)

    def caught(self, rows: int) -> list[torch.Tensor]:
        """Share of the exact attention on what the pattern lists, of at most so many queries of the grid.

        Returns:
            [B, H], one for each layout; none where the pattern is no list of tokens or sees everything.
        """
        from visattn.kernels.caught import caught_mass

        alone = len(self.layouts) == 1
        samples = [slice(None) if alone else slice(i, i + 1) for i in range(len(self.layouts))]
        found = [caught_mass(self, layout, at, rows) for at, layout in zip(samples, self.layouts, strict=True)]
        return [each for each in found if each is not None]


Watcher = Callable[[Watched], None]
