"""What stands for the attention of a module in a perturbed forward, which guidance compares with the plain one.

A perturbed output is `(1 - u) A + u P` for each head: A is what the module computes otherwise, P its attention under
the perturbation. `na(window=1)` makes an image token see itself and all text, so without text P is the values: the
identity of perturbed-attention guidance (https://arxiv.org/abs/2403.17377, section 4), in part and for some heads
(SoftPAG, https://arxiv.org/abs/2506.10978). `Blur` smooths the queries over the grid instead (SEG,
https://arxiv.org/abs/2408.00760, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.runtime.call import AttentionCall
from visattn.runtime.forward import Forward
from visattn.runtime.run import Run
from visattn.runtime.runner import Runner
from visattn.runtime.sequences import with_queries

# What counts call a module in a perturbed forward.
SUFFIX = " (perturbed)"


@dataclass(frozen=True)
class Blur:
    """Queries of the grid become Gaussian means of their neighbours; text is left alone.

    Attributes:
        sigma: Standard deviation in tokens; infinite for the mean of all.
    """

    sigma: float = math.inf

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"blur(sigma={self.sigma}) must have a positive sigma, in tokens")

    def __str__(self) -> str:
        return "blur" if math.isinf(self.sigma) else f"blur(sigma={self.sigma:g})"

    def queries(self, q: torch.Tensor, layouts: tuple[Layout, ...]) -> torch.Tensor:
        """Blurred queries.

        Args:
            q: Queries [B, S, H, D].
            layouts: Where their tokens sit, one for all samples or one for each.
        """
        parts = [q] if len(layouts) == 1 else list(q.split(1))
        return torch.cat([self._of_one(part, layout) for part, layout in zip(parts, layouts, strict=True)])

    def _of_one(self, q: torch.Tensor, layout: Layout) -> torch.Tensor:
        first, last = layout.prefix, layout.prefix + layout.tokens
        found = q[:, first:last].float().unflatten(1, layout.grid)
        for axis, size in enumerate(layout.grid, start=1):
            found = (found.movedim(axis, -1) @ self._weights(size).to(found).T).movedim(-1, axis)
        return torch.cat([q[:, :first], found.flatten(1, layout.dims).to(q.dtype), q[:, last:]], 1)

    def _weights(self, size: int) -> torch.Tensor:
        """Shares [to, from] of each token of an axis in each mean; what lies beyond the border counts for nothing."""
        if math.isinf(self.sigma):
            return torch.full((size, size), 1.0 / size, device="cpu")
        at = torch.arange(size, dtype=torch.float64, device="cpu")
        weights = torch.exp(-((at[:, None] - at) ** 2) / (2 * self.sigma**2))
        return weights / weights.sum(1, keepdim=True)


class Perturbed(Runner):
    """The attention of one module in a perturbed forward.

    Attributes:
        plain: What the module runs otherwise.
        by: The perturbation.
        strength: How much of it heads get.
        heads: Which heads, None for all.
        calls: How many it stood in for.
    """

    def __init__(
        self, run: Run, plain: Runner, by: Pattern | Blur, strength: float, heads: frozenset[int] | None = None
    ) -> None:
        super().__init__(run, plain.given if isinstance(by, Blur) else by, "auto", plain.stock)
        self.plain, self.by, self.strength, self.heads = plain, by, strength, heads
        self.calls = 0

    def __call__(self, call: AttentionCall, site: str) -> torch.Tensor:
        """The perturbed output [B, S, H, D].

        Raises:
            ValueError: If the perturbation cannot stand for the call.
        """
        self.calls += 1
        if isinstance(self.by, Blur):
            found = self.plain.attend(call.of((self._blurred(call, site), call.k, call.v)), site)[0]
        else:
            found = self._under(call, site)
        if self.heads is None and self.strength == 1:
            return found
        plain = self.plain.attend(call, site)[0]
        return plain + self._shares(call.q.shape[2], site).to(found) * (found - plain)

    def _shares(self, heads: int, site: str) -> torch.Tensor:
        """How much of the perturbation each head gets, [H, 1]."""
        shares = torch.zeros(heads, 1, device="cpu")
        chosen = sorted(range(heads) if self.heads is None else self.heads)
        if chosen and chosen[-1] >= heads:
            raise ValueError(f"guide: heads has {chosen[-1]} for {site}, whose heads are 0 to {heads - 1}")
        shares[chosen] = self.strength
        return shares

    def _under(self, call: AttentionCall, site: str) -> torch.Tensor:
        # Counted apart from what the module runs otherwise.
        out, layouts = self.attend(call, f"{site}{SUFFIX}")
        if self.run.forward is not None:
            self.run.forward.hits.append(site)
        why = "" if layouts else self.fit(call).why
        if why:
            raise ValueError(f"guide: attention of {site} cannot run {self.by}: {why}; leave it out of layers=")
        return out

    def _blurred(self, call: AttentionCall, site: str) -> torch.Tensor:
        layouts = self.places(call)
        if not isinstance(layouts, str) and call.q.shape[1] < call.k.shape[1]:
            layouts = with_queries(call.q.shape[1], layouts)
        if isinstance(layouts, str):
            raise ValueError(f"guide: queries of {site} cannot be blurred: {layouts}; leave it out of layers=")
        assert isinstance(self.by, Blur)
        return self.by.queries(call.q, layouts)

    def _rests(self, forward: Forward) -> bool:
        return False

    @property
    def _always(self) -> bool:
        return True
