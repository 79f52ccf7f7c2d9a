"""Calls of `attention` in 8 bits on the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from visattn.keep import CALL_BYTES, STORE
from visattn.kernels.masks import settled
from visattn.kernels.triton.arguments import Operands, Work
from visattn.kernels.triton.config import DIRECTIONS, EIGHT, EIGHT_HOPPER, Config, config, family
from visattn.kernels.triton.hopper.launch import hopper_config
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern, RoutedPattern
from visattn.problem import Call, Problem, Support

if TYPE_CHECKING:
    from visattn.kernels.triton.again import Again
    from visattn.kernels.triton.prepared import Kernels

# Channels that a product of bytes takes at once.
SMALLEST = 32


def eight_config(
    architecture: int, dtype: torch.dtype, head_dim: int, pattern: Pattern, layout: Layout, masked: bool
) -> Config:
    """The configuration of the forward in 8 bits.

    Args:
        architecture: Compute capability times ten, 0 for the interpreter.
        dtype: Of q, k and v.
        head_dim: Channels per head.
        pattern: The pattern.
        layout: The tokens.
        masked: Whether there is a key mask.
    """
    own = EIGHT_HOPPER.get(head_dim)
    if own is not None and not masked and hopper_config(architecture, dtype, head_dim, pattern, layout) is not None:
        return own
    rows = EIGHT[family(architecture)]
    return rows[min(d for d in rows if d >= head_dim)]


def fits_8bit(problem: Problem, architecture: int, interpreted: bool) -> Support:
    """Whether the kernels of 8 bits run a call that those along lists run.

    Args:
        problem: The call.
        architecture: Compute capability times ten.
        interpreted: Whether Triton interprets kernels.
    """
    largest = max(EIGHT[family(architecture)])
    if problem.rpb:
        return Support(False, f"in {problem.precision} it adds no relative position bias")
    if not SMALLEST <= problem.head_dim <= largest:
        return Support(False, f"in {problem.precision} it takes head dims from {SMALLEST} to {largest}")
    if isinstance(problem.pattern, RoutedPattern) and problem.pattern.pools_rest:
        return Support(False, f"in {problem.precision} it pools no keys of what {problem.pattern.name} leaves out")
    if isinstance(problem.pattern, DynamicPattern) and problem.pattern.skip:
        return Support(False, f"in {problem.precision} it skips nothing of what {problem.pattern.name} lists")
    if problem.precision == "fp8" and not interpreted and architecture < 89:
        return Support(False, f"compute capability {architecture / 10} has no products of fp8: take int8")
    return Support(True)


def attend_8bit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, architecture: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [B, S, H, D] and log-sum-exp [B, S, H], None unless the call wants it.

    Args:
        q: Queries [B, S, H, D]; channels are contiguous.
        k: Keys [B, N, Hkv, D], likewise.
        v: Values, likewise.
        call: The call.
        architecture: Compute capability times ten, 0 for the interpreter.
    """
    if call.scale < 0:
        q, call = -q, replace(call, scale=-call.scale)
    mask = None if call.key_mask is None else call.key_mask.contiguous()
    shapes = q.shape, k.shape, q.stride(), k.stride(), v.stride()
    key = (
        attend_8bit, call.pattern, call.layout, call.scale, q.dtype, q.device, shapes, mask is None, call.precision,
        call.lse,
    )  # fmt: skip
    entry = STORE.find(key)
    if entry is None:
        made = eight_bit(q, k, v, replace(call, key_mask=mask), architecture, lambda: STORE.weigh(key))
        entry = STORE.put(key, made, CALL_BYTES)
    calls: EightBit = entry.value
    return calls(q, k, v, mask)


def eight_bit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, architecture: int, grown: Callable[[], None]
) -> EightBit:
    """What runs calls in 8 bits that are like this one.

    Args:
        q: Queries; channels are contiguous, as those of keys and values.
        k: Keys.
        v: Values.
        call: The first call; its scale is not negative.
        architecture: Compute capability times ten, 0 for the interpreter.
        grown: Called when a kernel has become ready.
    """
    # Not before a call: asking what runs here imports no triton.
    from visattn.kernels.triton.prepared import Kernels

    masked = call.key_mask is not None or not call.scale

    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> dict[str, Config]:
        dim = q.shape[3]
        configs = {d: config(architecture, q.dtype, dim, d) for d in DIRECTIONS}
        return configs | {"forward": eight_config(architecture, q.dtype, dim, call.pattern, call.layout, masked)}

    kernels = Kernels(q, k, v, replace(call, key_mask=None), False, choose, grown)
    return EightBit(kernels, call.precision == "fp8", call.lse, grown)


class EightBit:
    """Calls in 8 bits that are alike: what the first one launches is started again for the others.

    Args:
        kernels: What they share with those of 16 bits.
        fp8: Whether weights and values become e4m3 instead of int8.
        lse: Whether the log-sum-exp is wanted.
        grown: Called when more is kept.
    """

    def __init__(self, kernels: Kernels, fp8: bool, lse: bool, grown: Callable[[], None]) -> None:
        self._kernels, self._fp8, self._lse, self._grown = kernels, fp8, lse, grown
        self._routed = isinstance(kernels.pattern, RoutedPattern)
        self._again: Again | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [B, S, H, D] and log-sum-exp [B, S, H], see `Backend.run`; `rpb` is None."""
        k, v = settled(k, key_mask), settled(v, key_mask)
        # Lists that skip have been refused.
        routed: Any = self._kernels.lists(q, k, v, key_mask, False) if self._routed else None
        given, work = {"q": q, "k": k, "v": v}, self._kernels.work(q, k, v)
        if key_mask is not None:
            given["key_mask"] = key_mask.view(torch.uint8)
        if work.configs["forward"].hopper:
            given["taken"] = work.starts.counter()
        if self._again is not None:
            made = self._again(*given.values(), lists=() if routed is None else routed.addresses("forward"))
            if made is not None:
                return self._results(made.results)
        # Each is a tensor of its own, also where they are one: the next ones may not be.
        given = {name: t.view_as(t) for name, t in given.items()}
        return self._results(self._first(Operands(**given, routed=routed), work, [*given.values()]))

    def _first(self, t: Operands, work: Work, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of a call whose launches are not known, which they are behind it."""
        from visattn.kernels.triton.again import Again
        from visattn.kernels.triton.eightbit.launch import forward
        from visattn.kernels.triton.start import recording

        results = [t.q.new_empty(t.q.shape)]
        if self._lse:
            results.append(t.q.new_empty((t.q.shape[0], t.q.shape[2], t.q.shape[1]), dtype=torch.float32))
        t.out, t.lse = (*results, None)[:2]
        with recording() as launches:
            made = forward(t, work, self._fp8)
        if self._again is None and launches and all(start is not None for start, _ in launches):
            lists = () if t.routed is None else t.routed.program("forward").own_lists
            self._again = Again(launches, given, results, made.tensors(), lists)
            self._grown()
        return results

    @staticmethod
    def _results(found: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, *lse = found
        return out, lse[0].transpose(1, 2) if lse else None
