"""The attention function of a patched model: what ComfyUI calls instead of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from visattn.clients.comfy.records import Record, where
from visattn.dims import check_dims
from visattn.patterns import Dense
from visattn.report import Report
from visattn.request import Request
from visattn.runtime.call import AttentionCall
from visattn.runtime.run import Run, Step
from visattn.runtime.runner import Runner
from visattn.runtime.where import REST
from visattn.schedule import Given
from visattn.selectors import SiteName

# Layers that a schedule can name; no model has as many.
MOST_LAYERS = 512
# Where self-attention of other sequences than the grid's is counted.
ELSEWHERE = "other sequences"
UNASKED = "no attention of this forward asked for an override: this version of ComfyUI hands it no options of the model"


@dataclass(frozen=True)
class Span:
    """In which part of the sampling a pattern runs.

    Attributes:
        first: The largest noise level.
        last: The smallest.
    """

    first: float = float("inf")
    last: float = 0.0

    def has(self, sigma: float | None) -> bool:
        """Whether a noise level is in it; an unknown one is."""
        return sigma is None or self.last <= sigma <= self.first


class At(threading.local):
    """Where a thread is.

    Attributes:
        options: What ComfyUI hands to the model.
        turn: Self-attention calls of this forward so far.
        text: Tokens of the text, None if unknown.
        stock: Whether it runs the attention of others.
    """

    options: Mapping[str, Any] = {}
    turn: int = 0
    text: int | None = None
    stock: bool = False


class ComfyRun(Run):
    """The state of one patched model of ComfyUI."""

    def __init__(self, record: Record, request: Request, span: Span, min_tokens: int) -> None:
        super().__init__(record.models, request.schedule, request.strict, (self._told,), always=request.always)
        self.record, self.request, self.span, self.min_tokens = record, request, span, min_tokens
        self.at = At()
        names = [SiteName(f"attention.{i}", f"attention.{i}") for i in range(MOST_LAYERS)]
        self._assigned = request.schedule.assign(names, record.models)
        self._runners: dict[Given, Runner] = {}
        self.sites: dict[str, Given] = {}
        for pattern in set(request.schedule.patterns):
            check_dims(pattern, record.dims, record.models)

    def __deepcopy__(self, memo: Any) -> ComfyRun:
        """Clones of a patched model share what it counts."""
        return self

    def forward_begins(self, model: Any, x: torch.Tensor, given: Mapping[str, Any]) -> None:
        """A forward of the model begins."""
        self.at.options, self.at.turn = given.get("transformer_options") or {}, 0
        context = given.get("context")
        self.at.text = context.shape[1] if isinstance(context, torch.Tensor) and context.ndim == 3 else None
        self.start(where(self.record, model, x, given), dense=not self.span.has(self.sigma))

    def forward_ends(self) -> None:
        """A forward of the model is over: see whether it reached what was selected."""
        forward = self.here.forward
        if forward is not None and not self.at.turn:
            first = next((layer for layer, given in enumerate(self._assigned) if given is not None), None)
            if first is not None and self.runner(first) is not None:
                forward.reasons[f"attention.{first}"] = forward.reasons.get(ELSEWHERE, UNASKED)
        self.finish()

    def _told(self) -> Step:
        """The denoising step, by how many noise levels of the sampling are above the one of now."""
        levels, now = self.at.options.get("sample_sigmas"), self.sigma
        if levels is None or now is None:
            return None, None
        return int((levels > now * (1 + 1e-6)).sum()), max(len(levels) - 1, 1)

    @property
    def sigma(self) -> float | None:
        """The noise level of this forward, None if unknown."""
        sigmas = self.at.options.get("sigmas")
        return None if sigmas is None else float(sigmas.flatten()[0])

    def runner(self, layer: int) -> Runner | None:
        """Who runs a self-attention call of a forward, None where no rule selects it."""
        pattern = self._assigned[layer] if layer < MOST_LAYERS else None
        if pattern is None:
            return None
        site = f"attention.{layer}"
        if site not in self.sites:
            self.sites[site] = pattern
            if not isinstance(pattern, Dense):
                self.sparse_sites.append(site)
        return self.shared(pattern)

    def shared(self, pattern: Given) -> Runner:
        """The runner of a pattern."""
        if pattern not in self._runners:
            self._runners[pattern] = Runner(self, pattern, self.request.backend, _run_stock)
        return self._runners[pattern]

    def report(self) -> Report:
        """What happened so far."""
        extra = {ELSEWHERE: Dense()} if ELSEWHERE in self.tally.rows() else {}
        sites = self.reports({**self.sites, **extra}, self.request.backend)
        return Report(tuple(sites), self.schedule.dense_steps, self.schedule.dense_last_steps)


def _run_stock(call: AttentionCall) -> torch.Tensor:
    return call.own()


class Override:
    """ComfyUI's `optimized_attention_override`.

    Attributes:
        run: The state of the model.
        previous: The override that was there, or None.
    """

    def __init__(self, run: ComfyRun, previous: Callable[..., Any] | None) -> None:
        self.run, self.previous = run, previous

    def __deepcopy__(self, memo: Any) -> Override:
        """Clones of a patched model share it."""
        return self

    def __call__(self, func: Callable[..., Any], q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        """Attention of q, k, v [B, S, heads * D], or [B, heads, S, D] with `skip_reshape`; out likewise."""
        at = self.run.at

        def own() -> Any:
            if self.previous is None or at.stock:
                return func(q, k, v, heads, *args, **kwargs)
            # One that was set after this one may call it in turn.
            at.stock = True
            try:
                return self.previous(func, q, k, v, heads, *args, **kwargs)
            finally:
                at.stock = False

        if at.stock or self.run.here.forward is None or not all(isinstance(t, torch.Tensor) for t in (q, k, v)):
            return own()
        names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        given = dict(zip(names, args, strict=False)) | kwargs
        call = _call(q, k, v, heads, given)
        if call is None or call.q.shape[1] != call.k.shape[1]:
            # Attention to another sequence, as to the text.
            return own()
        plain, flat = own, not given.get("skip_output_reshape")

        def stock() -> torch.Tensor:
            out = plain()
            return out.unflatten(2, (heads, -1)) if flat else out.transpose(1, 2)

        out = self._attend(call.with_own(stock))
        return out.flatten(2) if flat else out.transpose(1, 2)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention [B, S, H, D] of a call to its own sequence."""
        run, at = self.run, self.run.at
        forward = run.here.forward
        assert forward is not None
        layouts: Any = forward.layouts(call.q.shape[1])
        if call.q.shape[1] == at.text and REST in (run.record.prefix, run.record.suffix):
            # A long text is no grid with little text around it.
            layouts = f"a sequence of {at.text} tokens is as long as the text"
        if isinstance(layouts, str):
            # Text that refines itself, or nothing that the record knows.
            return run.shared(Dense()).leave(call, ELSEWHERE, layouts)
        site = f"attention.{at.turn}"
        runner = run.runner(at.turn)
        at.turn += 1
        if runner is None:
            return call.own()
        run.enter(site)
        if layouts[0].tokens < run.min_tokens:
            forward.excused.add(site)
            forward.reasons.setdefault(site, f"its grids have less than min_tokens={run.min_tokens} tokens")
            return runner.leave(call, site, "")
        key = None
        if call.mask is None:
            (q, k, v), scale = call.tensors, call.scale
            found = runner.attend_alike(q, k, v, scale, False, "eager", call.own)
            if found is not None:
                return found[0]
            key = runner.key(q, k, v, scale, False, "eager")
        return runner.attend(call.autocast(), site, key=key)[0]


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, given: Mapping[str, Any]
) -> AttentionCall | None:
    """A call of ComfyUI as a runner takes it, None for tensors of other forms."""
    if given.get("skip_reshape"):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    elif q.ndim == 3 and q.shape[2] % heads == 0:
        # Stable Diffusion 3 splits the heads of v alone.
        q, k, v = (t.unflatten(2, (-1, q.shape[2] // heads)) if t.ndim == 3 else t for t in (q, k, v))
    else:
        return None
    mask = given.get("mask")
    if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3):
        # As the attention of ComfyUI reads them: [S, S], or [B, S, S].
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    return AttentionCall(q, k, v, mask, given.get("scale"), grouped=k.shape[2] != heads)
