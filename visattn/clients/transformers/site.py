"""One attention module of a patched tower: from a call of transformers to a call that a runner takes."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from visattn.attend import attention
from visattn.clients.transformers.grids import Chunk, Chunks, Sorted, Stages
from visattn.clients.transformers.interface import Attend, Own
from visattn.clients.transformers.order import row_major
from visattn.layout import Layout
from visattn.patterns import Dense
from visattn.runtime.call import AttentionCall
from visattn.runtime.forward import Where
from visattn.runtime.run import Run
from visattn.runtime.runner import Runner

# Options of a call that change what attention is.
OTHERS = ("position_bias", "softcap", "s_aux", "sliding_window")


class TowerRun(Run):
    """The state of one patched tower.

    Attributes:
        traced: Where the tokens of the last forward sit, for compiled code.
        compiled: Whether compiled code told that.
        told: Whether a break in compiled code was told.
        strays: Tells whether somebody has set another implementation of attention since.
        repair: Puts the pattern in its place.
    """

    traced: Where | None = None
    compiled: bool = False
    told: bool = False
    strays: Callable[[], bool] = staticmethod(lambda: False)
    repair: Callable[[], None] = staticmethod(lambda: None)

    def break_in(self, path: str) -> None:
        """A module runs between parts of compiled code: nothing tells which forward that is.

        Raises:
            ValueError: If the run is strict.
        """
        said = (
            f"torch.compile could not follow the whole of {self.name}, and between its parts {path} runs stock "
            "attention: fullgraph=True says why, compile blocks or leave compile() out"
        )
        if self.strict:
            raise ValueError(f"strict: {said}")
        if not self.told:
            self.told = True
            warnings.warn(said, stacklevel=4)


class Told(threading.local):
    """What the arguments of an attention module told in a thread.

    Attributes:
        layout: Where its tokens sit, None if they did not tell.
        turn: How many calls it has made since.
    """

    layout: Layout | None = None
    turn: int = 0


class Site:
    """What a patched attention module knows.

    Attributes:
        run: Of its tower.
        path: Of the module in its model.
        runner: Runs its pattern.
        stock: The attention that it had.
        told: What its arguments told.
        traced: The same in compiled code.
    """

    def __init__(self, run: TowerRun, path: str, runner: Runner, stock: Attend) -> None:
        self.run, self.path, self.runner, self.stock = run, path, runner, stock
        self.told = Told()
        self.traced: Layout | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies of the module that copy its attributes one by one have no patch; see `visattn.copies`."""
        return type(None), ()

    def attend(self, own: Own) -> torch.Tensor:
        """Attention [B, S, H, D].

        Raises:
            ValueError: If its weights are asked for.
        """
        if own.options.get("output_attentions"):
            raise ValueError(
                "output_attentions=True needs all attention weights, which a pattern does not compute: see some rows "
                "by handle.watch(...), or remove() the handle"
            )
        if torch.compiler.is_compiling():
            return self._traced(own)
        run, (q, k, v) = self.run, own.tensors
        if run.compiled and run.forward is None and not isinstance(self.runner.pattern, Dense):
            run.break_in(self.path)
        run.enter(self.path)
        call, chunk, key = to_call(own), self._chunk(q.shape[2]), None
        if call.layouts is None and chunk is not None:
            return self._in_order(own, call, chunk)
        if call.layouts is None and self.told.layout is not None:
            call = call.placed(_fits(self.told.layout, q.shape[2]))
        if call.mask is None and call.layouts is None and not (call.dropout or call.causal or call.local):
            stock = functools.partial(_turned, own)
            found = self.runner.attend_alike(q, k, v, call.scale, True, "eager", stock)
            if found is not None:
                return found[0].transpose(1, 2)
            key = self.runner.key(q, k, v, call.scale, True, "eager")
        return self.runner.attend(call.autocast(), self.path, key=key)[0]

    def _chunk(self, length: int) -> Chunk | Sorted | None:
        """Where the tokens of this call sit, if the module makes several or gets them in another order."""
        forward = self.run.forward
        if forward is not None and isinstance(forward.where, Stages):
            return forward.where.of(length)
        if forward is None or not isinstance(forward.where, Chunks):
            return None
        calls, told = forward.where.calls, self.told
        told.turn += 1
        return calls[(told.turn - 1) % len(calls)]

    def _in_order(self, own: Own, call: AttentionCall, chunk: Chunk | Sorted) -> torch.Tensor:
        """Attention of tokens that are not row by row."""
        forward = self.run.forward
        assert forward is not None
        call = call.placed(_fits(chunk.layout, call.q.shape[1]))
        if forward.dense or isinstance(self.runner.pattern, Dense) or isinstance(call.layouts, str):
            return self.runner.attend(call.autocast(), self.path)[0]
        order, back = row_major(chunk, call.q.device)
        ordered = call.of(t[:, order] for t in call.tensors).with_own(lambda: own()[:, order])
        return self.runner.attend(ordered.autocast(), self.path)[0][:, back]

    def _traced(self, own: Own) -> torch.Tensor:
        """The same while torch.compile traces: nothing is counted, and what can run is decided here and now.

        Raises:
            ValueError: If that depends on the values of a mask, or the tower attends image by image.
        """
        where, call, length = self.run.traced, to_call(own), own.tensors[0].shape[2]
        if isinstance(self.runner.pattern, Dense):
            return own()
        if isinstance(where, Chunks):
            raise ValueError(
                f"{self.run.name} attends image by image, which patterns follow outside of compiled code only: "
                "compile the text model alone, or remove() the handle"
            )
        if isinstance(where, Stages):
            raise ValueError(
                f"{self.run.name} sorts its tokens by the pooling to come, which patterns follow outside of compiled "
                "code only: leave compile() out, or remove() the handle"
            )
        if call.mask is not None:
            raise ValueError(
                f"{self.run.name} got a mask, and compiled code does not see whether it only hides padding: leave the "
                "mask out or compile() away"
            )
        told = self.traced
        found = _fits(told, length) if told is not None else "" if where is None else where.layouts(length)
        backend, pattern = self.runner.backend, self.runner.pattern
        if isinstance(found, str) or call.refusal() or call.layouts is not None:
            return own()
        covers = self.runner.precision is None and pattern.covers(found[0].grid)
        if backend == "auto" and covers and not call.local:
            return own()
        parameters = {name: value.to(call.q.device) for name, value in self.runner.parameters.items()}
        rest: dict[str, Any] = {"parameters": parameters} if parameters else {}
        if call.rpb is not None:
            rest["rpb"] = call.rpb
        rest["precision"] = self.runner.precision
        return attention(*call.tensors, pattern, found[0], scale=call.scale, backend=backend, **rest)


def _turned(own: Own) -> torch.Tensor:
    return own().transpose(1, 2)


def to_call(own: Own) -> AttentionCall:
    """A call of transformers as a runner takes it."""
    (q, k, v), options = own.tensors, own.options
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(own.module, "is_causal", True)
    scale = options.get("scaling")
    why = _others(options) or (f"its scale is a {type(scale).__name__}" if isinstance(scale, torch.Tensor) else "")
    call = AttentionCall(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        own.mask,
        None if isinstance(scale, torch.Tensor) else scale,
        grouped=k.shape[1] != q.shape[1],
        dropout=options.get("dropout", 0.0),
        causal=bool(causal) and own.mask is None,
        own=own,
        rpb=options.get("rpb"),
        local=options.get("local", False),
    )
    return call.placed(why) if why else call


def _others(options: Mapping[str, Any]) -> str:
    found = [name for name in OTHERS if options.get(name) is not None]
    return f"its call has {', '.join(found)}" if found else ""


def _fits(layout: Layout, length: int) -> tuple[Layout, ...] | str:
    return (layout,) if layout.length == length else f"a sequence of {length} tokens is not {layout}"


def run_stock(call: AttentionCall) -> torch.Tensor:
    """The attention that a module had, [B, S, H, D]: the `stock` of runners."""
    own: Callable[[], torch.Tensor] = call.own
    return own()
