"""The attention modules of a diffusers model that compiled code cannot tell apart."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from visattn.layout import Layout
from visattn.parallel.ulysses import JOINS_HEADS
from visattn.patterns import Pattern, PerHead
from visattn.pipelines.patch import numbering, parallel
from visattn.pipelines.patch.decision import Cut, Decision
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.stock import Stock
from visattn.runtime.call import AttentionCall
from visattn.runtime.runner import Runner
from visattn.schedule import Given

# Decisions of a group that are kept, of 4 KB each.
MANY = 64


class Group(Runner):
    """A runner that compiled code knows by a number: layers of one group share a graph.

    Attributes:
        number: That number.
        lease: The right to it.
    """

    run: DiffusersRun
    stock: Stock

    def __init__(
        self,
        run: DiffusersRun,
        given: Given,
        backend: str,
        stock: Stock,
        parameters: torch.nn.ParameterDict | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(run, given, backend, stock, parameters, precision)
        self.lease = numbering.register(self, stock)
        self.number = self.lease.number
        self._encoded: dict[tuple[tuple[Layout, ...], Pattern, Cut | None], torch.Tensor] = {}
        numbering.register_tensors(self.lease, self.parameters.values())
        run.compiled_patterns[self.unnamed] = given
        if run.paths:
            numbering.register_paths(self.lease, run.paths)

    def release(self) -> None:
        """Give the number up."""
        self.lease.end()
        del self.lease

    def encoded(
        self, layouts: tuple[Layout, ...], cut: Cut | None = None, pattern: Pattern | None = None
    ) -> torch.Tensor:
        """The `Decision` that the backward of a call has to know, as bytes.

        Args:
            layouts: Those that the pattern ran on.
            cut: How processes shared them.
            pattern: What ran, the group's pattern if None.
        """
        pattern = pattern or self.pattern
        found = self._encoded.get((layouts, pattern, cut))
        if found is None:
            names = tuple(self.parameters.keys())
            made = Decision(layouts, pattern, self.backend, self.run.mask_row, self.stock, names, cut)
            if len(self._encoded) >= MANY:
                self._encoded = {}
            self._encoded[layouts, pattern, cut] = found = made.encode()
        # Compiled code may write into what an operator gave it.
        return found.clone()

    def attend_in_parallel(self, call: AttentionCall) -> torch.Tensor:
        """`attend` on one of several devices that share the sequence: q, k, v [B, S / devices, H, D].

        What does not run the pattern is left to diffusers, which exchanges tokens for heads by itself.
        """
        devices, site = parallel.degree(call.parallel), self.run.site
        fit = self.fit(replace(call.of(parallel.whole(t, devices) for t in call.tensors), mask=None))
        why = fit.why
        if fit.layouts:
            heads = math.gcd(call.q.shape[2], call.k.shape[2])
            wider = call.k.shape[1] > call.q.shape[1]
            why = (
                parallel.MORE_KEYS
                if wider
                else parallel.OWN_HEADS
                if isinstance(self.pattern, PerHead)
                else JOINS_HEADS
                if self.pattern.joins_heads
                else parallel.SPLIT_MASK
                if call.mask is not None
                else parallel.uneven(fit.layouts, heads, devices)
            )
        if not fit.layouts or why:
            return self.leave(call, site, why)
        layout, config = fit.layouts[0], call.parallel
        gathered = call.of(parallel.gather(t, layout, config) for t in call.tensors)
        out, _ = self.attend(replace(gathered, parallel=None), site)
        return parallel.scatter(out, layout, config)
