"""Prepared calls: what is left of a call on tile lists once others like it have run.

That is: allocate the results, collect addresses, start kernels. All else is decided when the first of them comes.
The names of the tensors whose addresses are collected here, and their order, are `launch.CHANGING`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from visattn.kernels.triton.arguments import Operands, Routed, Work
from visattn.kernels.triton.choosing.listed import DynamicLists
from visattn.kernels.triton.choosing.pooled import rest_of
from visattn.kernels.triton.choosing.skipped import SkippingLists, skips_in_loop
from visattn.kernels.triton.choosing.tables import lists_by_blocks
from visattn.kernels.triton.config import DIRECTIONS, ONE_PASS, SHARING, Config, chosen_by_kernels
from visattn.kernels.triton.hopper.launch import copyable
from visattn.kernels.triton.launch import run_bias_gradients, run_in_one_pass, start_first
from visattn.kernels.triton.routes import Listed, MergedLists, routed_program
from visattn.kernels.triton.routing.router import Router
from visattn.kernels.triton.start import ALIGNMENT, Starts, aligned
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern, RoutedPattern, Routes
from visattn.patterns.shared_tiles import sharing_tiles
from visattn.patterns.tailed import held_for
from visattn.plans import TilePlan
from visattn.problem import Call

UNALIGNED = ALIGNMENT - 1


class Kernels:
    """Calls that are alike: same shapes, strides, dtype, device, pattern, layout, scale and options.

    Args:
        q: Queries of the first one; keys and values likewise.
        k: Keys.
        v: Values.
        call: The call; its scale is not negative.
        tf32: Whether float32 products may round their factors to tf32.
        choose: Gives launch configurations for tensors like these.
        grown: Called when a kernel has become ready.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        tf32: bool,
        choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Call], dict[str, Config]],
        grown: Callable[[], None],
    ) -> None:
        # What is kept for later calls holds no tensor of this one: of a bias its shape.
        bias = None if call.rpb is None else call.rpb.detach().to("meta")
        self._call = replace(call, key_mask=None, rpb=bias, parameters={})
        self._tf32, self._choose = tf32, choose
        self._by_blocks = lists_by_blocks(call.pattern)
        # Kernels of 8 bits read no masks that are made by the call.
        shares = call.precision is None
        self._shared = sharing_tiles(call.pattern, call.layout, SHARING) if shares else None
        self.starts = Starts(q.device, grown)
        # Of aligned tensors, which the first ones may not be.
        self._work: Work | None = None
        self._counted = False
        self._router: Router | None = None
        self._empty = not q.numel()
        self._queries, self._keys = _result(q, q.shape), _result(k, k.shape)
        batch, length, heads, _ = q.shape
        self._sums = _result(q, (batch, heads, length), torch.float32)
        # By strides of the gradients: whether the Hopper kernel reads copies of q and of the output's gradient.
        self._copied: dict[Any, bool] = {}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
        want_lse: bool,
        routed: Routed | SkippingLists | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the forward kernel: out [B, S, H, D], and the log-sum-exp [B, H, S] if it is wanted.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            key_mask: bool [B, S + extra], contiguous, or None.
            rpb: float32 [H, entries], contiguous, or None.
            want_lse: Whether the log-sum-exp is wanted.
            routed: Lists of a routed pattern.
        """
        if isinstance(routed, SkippingLists):
            return self._skipping(q, k, v, key_mask, want_lse, routed)
        rest = routed.rest if isinstance(routed, DynamicLists) else None
        want_lse = want_lse or rest is not None
        shape, strides, dtype, device = self._queries
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        addresses = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
        low = addresses[0] | addresses[1] | addresses[2]
        lse = None
        if want_lse:
            shape, strides, dtype, device = self._sums
            lse = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            addresses.append(lse.data_ptr())
        if rpb is not None or key_mask is not None:
            low |= _append(addresses, rpb, key_mask)
        start = self.starts.ready.get(("forward", want_lse))
        if start is not None and not low & UNALIGNED:
            # While a graph is captured nobody else holds it, and lists that are written next could lie in its place.
            taken = self.starts.counter() if self._counted else None
            if taken is not None:
                addresses.append(taken.data_ptr())
            if routed is not None:
                addresses += routed.addresses("forward")
            start(addresses)
        elif not self._empty:
            t = Operands(q, k, v, rpb, _bytes(key_mask), out, lse, routed=routed)
            work = self._work_for(t)
            t.taken = self.starts.counter() if work.configs["forward"].hopper else None
            start_first("forward", want_lse, t, work)
        if rest is not None and lse is not None and not self._empty:
            rest.add(q, out, lse, self._call.scale)
        return out, lse

    def _skipping(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        want_lse: bool,
        routed: SkippingLists,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same by the kernel whose loop passes over blocks."""
        shape, strides, dtype, device = self._queries
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        lse = None
        if want_lse:
            shape, strides, dtype, device = self._sums
            lse = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if not self._empty:
            routed.run(q, k, v, key_mask, out, lse, self._call.scale)
        return out, lse

    def lists(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        learns: bool,
        scale: float | None = None,
        given: torch.Tensor | None = None,
    ) -> Routed | SkippingLists:
        """What a routed pattern chooses for q and k, as the lists that the kernels walk.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            v: Values [B, S, Hkv, D].
            key_mask: bool [B, S], or None.
            learns: Whether the backward's lists are wanted too.
            scale: Factor on the logits of the queries that choose, None for the one of the kernels.
            given: Those where they are not q, which may have its sign turned.
        """
        used, q = q, q if given is None else given
        if self._router is not None and key_mask is None:
            return self._router.choose(q, k)
        pattern, work = self._call.pattern, self._work_for(Operands(used, k, v))
        if chosen_by_kernels(pattern, work.layout, key_mask is not None):
            router = Router(q, k, work, self.starts)
            if aligned((q, k)):
                self._router = router
            return router.choose(q, k)
        assert isinstance(pattern, RoutedPattern)
        scale = self._call.scale if scale is None else scale
        if not learns and isinstance(pattern, DynamicPattern) and pattern.skip and self._skips(pattern, q, work.layout):
            listed = pattern.listed(q, k, work.layout, key_mask, scale)
            return SkippingLists(pattern, listed, work.layout, self._tf32)
        if isinstance(pattern, DynamicPattern) and self._shared is not None:
            chosen = pattern.choose(q, k, work.layout, key_mask, scale)
            return MergedLists(chosen, pattern.blocks(work.layout.grid), work)
        if isinstance(pattern, DynamicPattern) and self._by_blocks:
            chosen = pattern.choose(q, k, work.layout, key_mask, scale)
            rest = None
            if pattern.pools_rest:
                rest = rest_of(pattern, chosen, k, v, work.layout, key_mask, self._tf32, q.shape[2])
            return DynamicLists(chosen, work, rest)
        routes: dict[TilePlan, Routes] = {}
        programs = {}
        for direction in DIRECTIONS if learns else ("forward",):
            plan = work.plan(direction)
            if plan not in routes:
                routes[plan] = pattern.route(q, k, plan, key_mask, scale)
            programs[direction] = routed_program(plan, direction == "key_grad", routes[plan])
        return Listed(programs)

    def _skips(self, pattern: DynamicPattern, q: torch.Tensor, layout: Layout) -> bool:
        """Whether the kernel whose loop passes over blocks runs these calls."""
        free = held_for(pattern) is None and self._call.rpb is None and self._by_blocks
        return free and skips_in_loop(pattern, layout, q)

    @property
    def pattern(self) -> Pattern:
        """The pattern of these calls."""
        return self._call.pattern

    def work(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Work:
        """What calls on tensors like these share."""
        return self._work_for(Operands(q, k, v))

    def _work_for(self, t: Operands) -> Work:
        """What calls on tensors as aligned as these share: copies of the Hopper kernels take aligned ones only."""
        whole = aligned((t.q, t.k, t.v))
        if whole and self._work is not None:
            return self._work
        call = self._call
        made = Work(
            self._shared or call.pattern,
            call.layout,
            call.scale,
            self._tf32,
            self._choose(t.q, t.k, t.v, call),
            self.starts,
        )
        if whole:
            self._work, self._counted = made, made.configs["forward"].hopper
        return made

    def backward(
        self,
        saved: Sequence[Any],
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        wanted: tuple[bool, bool, bool],
        key_mask: torch.Tensor | None = None,
        routed: Routed | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Delta pre-pass, then a kernel for each gradient that is wanted; no atomics, so deterministic.

        Args:
            saved: q, k, v and rpb of the forward, its output and its log-sum-exp [B, H, S].
            grad_out: Gradient of the output; its channels are contiguous.
            grad_lse: Gradient of the log-sum-exp [B, S, H], or None.
            wanted: Whether the gradients of q, of k and v, and of rpb are wanted.
            key_mask: As in `forward`.
            routed: As in `forward`.

        Returns:
            Gradients of q, k, v and rpb, None where they are not wanted.
        """
        rest = routed.rest if isinstance(routed, DynamicLists) and not self._empty else None
        shape, strides, dtype, device = self._sums
        delta = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        found = self._list_gradients(saved, grad_out, grad_lse, wanted, delta, key_mask, routed)
        if rest is not None:
            grad_q, grad_k, grad_v, _ = found
            own = saved[0], grad_out, saved[5], delta, self._call.scale
            if grad_q is not None:
                rest.query_gradients(*own, grad_q)
            if grad_k is not None and grad_v is not None:
                rest.key_gradients(*own, grad_k, grad_v)
        return found

    def _list_gradients(
        self,
        saved: Sequence[Any],
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        wanted: tuple[bool, bool, bool],
        delta: torch.Tensor,
        key_mask: torch.Tensor | None,
        routed: Routed | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """The same along the lists, for the log-sum-exp of all keys; fills `delta`."""
        q, k, v, rpb, out, lse = saved
        if self._empty:
            return tuple(None if t is None else torch.zeros_like(t) for t in (q, k, v, rpb))
        grad_q = grad_k = grad_v = None
        if wanted[1]:
            shape, strides, dtype, device = self._keys
            grad_k = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            grad_v = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if wanted[0]:
            shape, strides, dtype, device = self._queries
            grad_q = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        key = grad_out.stride(), None if grad_lse is None else grad_lse.stride()
        ready = self.starts.ready
        copied = self._copied.get(key, False)
        sums, keys, queries = (
            ready.get(("delta", key)), ready.get(("key_grad", (key, copied, True))), ready.get(("query_grad", key)),
        )  # fmt: skip
        low = q.data_ptr() | k.data_ptr() | v.data_ptr() | grad_out.data_ptr()
        more: list[int] = []
        if rpb is not None or key_mask is not None or grad_lse is not None:
            low |= _append(more, rpb, key_mask) | (0 if grad_lse is None else grad_lse.data_ptr())
        if routed is None and self._in_one_pass(wanted, key_mask) and not low & UNALIGNED and copyable(q, grad_out):
            t = Operands(q, k, v, rpb, None, out, lse, grad_out, grad_lse, delta, grad_q, grad_k, grad_v)
            run_in_one_pass(key, t, self._work_for(t))
            return grad_q, grad_k, grad_v, None
        if low & UNALIGNED or sums is None or (wanted[1] and keys is None) or (wanted[0] and queries is None):
            t = Operands(
                q, k, v, rpb, _bytes(key_mask), out, lse, grad_out, grad_lse, delta, grad_q, grad_k, grad_v,
                routed=routed,
            )  # fmt: skip
            return grad_q, grad_k, grad_v, self._first_backward(t, key, wanted[2])
        addresses = [out.data_ptr(), grad_out.data_ptr(), delta.data_ptr()]
        if grad_lse is not None:
            addresses.append(grad_lse.data_ptr())
        sums(addresses)
        inputs = [q.data_ptr(), k.data_ptr(), v.data_ptr(), grad_out.data_ptr(), lse.data_ptr(), delta.data_ptr()]
        if keys is not None and grad_k is not None and grad_v is not None:
            first = inputs
            if copied:
                # They live until the kernel is in the queue: then their memory is used again behind it.
                own_q, own_grad = q.contiguous(), grad_out.contiguous()
                first = [own_q.data_ptr(), *inputs[1:3], own_grad.data_ptr(), *inputs[4:]]
            keys([*first, grad_k.data_ptr(), grad_v.data_ptr(), *more, *_lists(routed, "key_grad")])
        if queries is not None and grad_q is not None:
            queries([*inputs, grad_q.data_ptr(), *more, *_lists(routed, "query_grad")])
        grad_rpb = None
        if wanted[2]:
            t = Operands(q, k, v, rpb, _bytes(key_mask), out, lse, grad_out, grad_lse, delta)
            grad_rpb = run_bias_gradients(t, self._work_for(t))
        return grad_q, grad_k, grad_v, grad_rpb

    def _in_one_pass(self, wanted: tuple[bool, bool, bool], key_mask: torch.Tensor | None) -> bool:
        """Whether one kernel computes all gradients that are wanted."""
        if self._work is None or wanted != (True, True, False) or key_mask is not None:
            return False
        configs = self._work.configs
        whole = self._keys[0][3] in ONE_PASS
        return whole and configs["key_grad"].one_pass > 0 and configs["query_grad"].hopper

    def _first_backward(self, t: Operands, key: Any, want_rpb: bool) -> torch.Tensor | None:
        """The same by Triton's launcher; returns the gradient of the bias."""
        work, q, grad_out = self._work_for(t), t.q, t.grad_out
        assert grad_out is not None
        start_first("delta", key, t, work)
        if t.grad_k is not None:
            copied = work.configs["key_grad"].hopper and not copyable(q, grad_out)
            whole = aligned((q, t.k, t.v, grad_out))
            if whole:
                self._copied[key] = copied
            if copied:
                t.q, t.grad_out = q.contiguous(), grad_out.contiguous()
            start_first("key_grad", (key, copied, whole), t, work)
            t.q, t.grad_out = q, grad_out
        if t.grad_q is not None:
            start_first("query_grad", key, t, work)
        return run_bias_gradients(t, work) if want_rpb else None


def _result(
    x: torch.Tensor, shape: Any, dtype: torch.dtype | None = None
) -> tuple[Any, Any, torch.dtype, torch.device]:
    """What torch.empty_strided takes for a contiguous result: it takes half as long as other ways to allocate."""
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return tuple(shape), tuple(strides), dtype or x.dtype, x.device


def _append(addresses: list[int], *tensors: torch.Tensor | None) -> int:
    """Append the addresses of those that there are; returns their bits together."""
    low = 0
    for tensor in tensors:
        if tensor is not None:
            address = tensor.data_ptr()
            addresses.append(address)
            low |= address
    return low


def _lists(routed: Routed | None, direction: str) -> list[int]:
    return [] if routed is None else routed.addresses(direction)


def _bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as Triton takes it."""
    return None if key_mask is None else key_mask.view(torch.uint8)
