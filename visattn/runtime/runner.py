"""Runs a pattern at the attention modules of a model where a call fits it, else what the model would run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from visattn.dispatch import Call, Problem
from visattn.layout import Layout
from visattn.parameters import following
from visattn.patterns import ComposedPattern, Dense, Pattern
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import carry_bias, key_validity
from visattn.runtime.run import Run
from visattn.runtime.sequences import Sequences
from visattn.watch import Watched


class Fit(NamedTuple):
    """Whether a call can run a pattern.

    Attributes:
        layouts: Where its tokens sit, of each sample where they differ; empty if it cannot.
        keys: Valid keys, or a bias, see `key_validity`.
        why: Why it cannot, "" if it is to be dense.
    """

    layouts: tuple[Layout, ...] = ()
    keys: torch.Tensor | None = None
    why: str = ""


class Runner:
    """Attention modules of one model that share a pattern and the attention to fall back to.

    Attributes:
        run: The state of the model.
        pattern: The pattern.
        backend: "auto" or the name of a backend.
        stock: What the model runs without visattn, as a function of the call.
        parameters: Learnable parameters of the pattern by name.
        unnamed: What stands for a module in reports where the caller does not know it.
    """

    def __init__(
        self,
        run: Run,
        pattern: Pattern,
        backend: str,
        stock: Callable[[AttentionCall], torch.Tensor],
        parameters: torch.nn.ParameterDict | None = None,
    ) -> None:
        self.run, self.pattern, self.backend, self.stock = run, pattern, backend, stock
        self.parameters = torch.nn.ParameterDict() if parameters is None else parameters
        self.unnamed = f"compiled code: {pattern}"

    def attend(
        self, call: AttentionCall, site: str | None, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[Layout, ...]]:
        """Run the pattern if the call fits it, else the stock attention, and count which.

        Args:
            call: The call.
            site: Path of the module, None where that is unknown.
            parameters: Learnable parameters, the runner's own if None; an operator passes those it got, as its
                gradients are theirs.

        Returns:
            Output [B, S, H, D], and the layouts that the pattern ran on, () if the stock attention ran.
        """
        device, name = call.q.device, site or self.unnamed
        if parameters is None:
            parameters = following(self.parameters, device)
        fit = self.fit(call)
        covered = self.backend == "auto" and all(self.pattern.covers(layout.grid) for layout in fit.layouts)
        sequences = Sequences(*call.tensors, fit.keys, 1.0, call.v.shape[-1])
        if not fit.layouts or covered:
            with self.run.tally.timed(name, "sparse" if fit.layouts else "dense", device):
                out = self.stock(call)
        else:
            with self.run.tally.timed(name, "sparse", device):
                sequences = Sequences.of(call, fit.keys)
                out = sequences.attend(self.pattern, fit.layouts, self.backend, parameters)
        if self.run.watcher is not None and site is not None and not (fit.why or call.causal or call.dropout):
            self._show(site, call, out, fit, parameters)
        if fit.layouts:
            self._hit(name, sequences, fit.layouts, parameters)
        else:
            self._miss(name, fit.why)
        return out, () if covered else fit.layouts

    def leave(self, call: AttentionCall, site: str | None, why: str) -> torch.Tensor:
        """Run the stock attention and count it, with the reason ("" means that it was to be dense)."""
        name = site or self.unnamed
        with self.run.tally.timed(name, "dense", call.q.device):
            out = self.stock(call)
        self._miss(name, why)
        return out

    def pass_by(self, site: str | None, why: str) -> None:
        """Count a call of a module that attended without calling this."""
        self._miss(site or self.unnamed, why)

    def fit(self, call: AttentionCall) -> Fit:
        """Whether the pattern can stand for a call."""
        forward = self.run.forward
        if forward is None:
            return Fit(why="called outside of the model's forward")
        if forward.dense or isinstance(self.pattern, Dense):
            return Fit()
        if why := call.refusal():
            return Fit(why=why)
        layouts = forward.layouts(call.q.shape[1])
        if isinstance(layouts, str):
            return Fit(why=layouts)
        if len(layouts) not in (1, call.q.shape[0]):
            return Fit(why=f"its batch of {call.q.shape[0]} is not the {len(layouts)} samples of the forward")
        keys = key_validity(call.mask, call.q, self.run.mask_row)
        if isinstance(keys, str):
            return Fit(why=keys)
        of_products = not isinstance(self.pattern, ComposedPattern) or self.pattern.of_products
        if keys is not None and keys.dtype != torch.bool and not of_products:
            return Fit(why=f"its mask {list(call.mask.shape)} is a bias, which {self.pattern.name} cannot add")
        return Fit(layouts, keys)

    def _show(
        self, site: str, call: AttentionCall, out: torch.Tensor, fit: Fit, parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Show a call that ran its pattern, or was to be dense, to the handle's watcher."""
        pattern, layouts, keys = self.pattern, fit.layouts, fit.keys
        q, k, v = call.tensors
        if not layouts:
            valid = key_validity(call.mask, q, self.run.mask_row)
            if isinstance(valid, str) or k.shape[1] != q.shape[1]:
                return
            pattern, layouts, keys, parameters = Dense(), (Layout(q.shape[1]),), valid, {}
        if keys is not None and keys.dtype != torch.bool:
            q, k, _ = carry_bias(q, k, v, keys, call.factor)
            keys = None
        assert self.run.watcher is not None
        self.run.watcher(Watched(site, q, k, v, out, pattern, layouts, call.factor, keys, parameters))

    def _hit(
        self, name: str, sequences: Sequences, layouts: tuple[Layout, ...], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Count a call that ran the pattern, once for each layout."""
        for i, layout in enumerate(layouts):
            q, k, v, keys, scale, _ = sequences if len(layouts) == 1 else sequences.sample(i)
            call = Call(self.pattern, layout, scale, keys, parameters=parameters)
            self._count(name, Problem.of(q, k, v, call))

    def _count(self, name: str, problem: Problem) -> None:
        """Count a call that ran the pattern."""
        self.run.tally.hit(name, problem)
        if self.run.forward is not None:
            self.run.forward.hits.append(name)

    def _miss(self, name: str, why: str) -> None:
        """Count a call that did not; "" means that it was to be dense."""
        if not why:
            self.run.tally.dense(name)
            return
        self.run.tally.fallback(name, why)
        if self.run.forward is not None:
            self.run.forward.reasons.setdefault(name, why)
