"""Where the calls of diffusers' attention processors, of both generations, come in.

Newer processors call `dispatch_attention_fn` with the backend they hold: they get a member of diffusers' enum of
backends that belongs to the group. Older ones call torch's SDPA, or `dispatch_attention_fn` without a backend: they
are replaced by a clone whose code is the same but whose `F` or `dispatch_attention_fn` is ours. All keep running
diffusers' own code for everything around the attention. Here their arguments become one record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch

from visattn.pipelines.patch import numbering, operators, telling
from visattn.pipelines.patch.on_slabs import attend_on_slabs
from visattn.pipelines.patch.parallel import degree
from visattn.pipelines.patch.stock import Stock
from visattn.runtime.call import AttentionCall


@functools.lru_cache(maxsize=1024)
def dispatched(number: int) -> Callable[..., torch.Tensor]:
    """What diffusers calls for the member of a group."""

    # The names of the parameters are how diffusers knows what to pass.
    def visattn_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        rest = attn_mask, dropout_p, is_causal, scale, enable_gqa
        return _dispatched(number, query, key, value, rest, _parallel_config)

    return visattn_attention


@functools.lru_cache(maxsize=1024)
def without_backend(number: int) -> Callable[..., torch.Tensor]:
    """What stands for `dispatch_attention_fn` in processors that hold no backend."""

    def dispatch_attention_fn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Any = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        rest = attn_mask, dropout_p, is_causal, scale, enable_gqa
        if backend is None:
            return _dispatched(number, query, key, value, rest, parallel_config)
        call = AttentionCall(query, key, value, *_call_order(rest), parallel=parallel_config, own=backend)
        # Compiled code does not carry a backend of one call.
        return Stock(True)(call) if torch.compiler.is_compiling() else call_group(number, call, True)

    return dispatch_attention_fn


def _dispatched(
    number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: tuple[Any, ...], parallel: Any
) -> torch.Tensor:
    """A call [B, S, H, D] through `dispatch_attention_fn`; `rest` is mask, dropout, causal, scale, grouped."""
    mask, dropout, causal, scale, grouped = rest
    kind = None
    if parallel is None and mask is None and not (dropout or causal or torch.compiler.is_compiling()):
        group = _group(number)
        if group is not None:
            stock = functools.partial(group.stock.unmasked, q, k, v, scale, grouped)
            found = group.attend_alike(q, k, v, scale, False, "eager", stock)
            if found is not None:
                return found[0]
            kind = group.key(q, k, v, scale, False, "eager")
    call = AttentionCall(q, k, v, *_call_order(rest), parallel=parallel)
    return call_group(number, call, True, kind)


def _call_order(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Mask, dropout, causal, scale, grouped in the order of `AttentionCall`."""
    mask, dropout, causal, scale, grouped = rest
    return mask, scale, grouped, dropout, causal


def _group(number: int) -> Any:
    """The group with a number, None where there is none or somebody replaces torch's functions."""
    return None if torch._C._len_torch_function_stack() else numbering.look_up(number)


@functools.lru_cache(maxsize=1024)
def sdpa(number: int) -> Callable[..., torch.Tensor]:
    """What stands for torch's SDPA in processors that call it."""

    def visattn_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.ndim != 4:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        kind = None
        if attn_mask is None and not (dropout_p or is_causal or torch.compiler.is_compiling()):
            group = _group(number)
            if group is not None:
                # Parsing a keyword costs as much as a function call.
                rest = {"scale": scale, "enable_gqa": enable_gqa} if enable_gqa or scale is not None else {}
                stock = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, **rest)
                found = group.attend_alike(query, key, value, scale, True, "eager", stock)
                if found is not None:
                    return found[0]
                kind = group.key(query, key, value, scale, True, "eager")
        call = AttentionCall(query, key, value, attn_mask, scale, enable_gqa, dropout_p, is_causal).swapped()
        return call_group(number, call, False, kind).transpose(1, 2)

    return visattn_attention


def call_group(number: int, call: AttentionCall, is_dispatched: bool, kind: Hashable = None) -> torch.Tensor:
    """Attention [B, S, H, D] at a module of a group.

    Args:
        number: Of the group.
        call: The call.
        is_dispatched: Whether it came through `dispatch_attention_fn`.
        kind: What calls that are decided like this one have in common, None for no others.
    """
    compiling = torch.compiler.is_compiling()
    sharing = numbering.look_up(number)
    if sharing is not None and sharing.run.sharding is not None:
        call = replace(call, parallel=None)
        if not compiling:
            return attend_on_slabs(sharing, call.autocast())[0]
        if call.dropout or call.causal or not (call.mask is None or isinstance(call.mask, torch.Tensor)):
            raise ValueError("a call that is causal, has dropout or a mask of its own kind cannot run under parallel=")
    if call.parallel is not None and degree(call.parallel) > 1:
        if compiling:
            raise ValueError("patterns under context parallelism do not run in compiled code: leave out compile()")
        group = numbering.look_up(number)
        return Stock(is_dispatched)(call) if group is None else group.attend_in_parallel(call)
    call = replace(call, parallel=None).autocast()
    if compiling:
        if torch.compiler.is_exporting():
            raise ValueError(
                "a program of torch.export outlives the patch of a diffusers model, whose number in it would then mean "
                "another pattern or none: export the model after handle.remove(), or use torch.compile"
            )
        if call.dropout or call.causal or not (call.mask is None or isinstance(call.mask, torch.Tensor)):
            return Stock(is_dispatched)(call)
        tensors = numbering.tensors_of(number)
        module = telling.ENTERED.number if numbering.tells_modules(number) else None
        rest = call.mask, call.scale, call.grouped, number, tensors, module
        return operators.PATCHED_ATTENTION(call.q, call.k, call.v, *rest)[0]
    group = numbering.look_up(number)
    if group is None:
        # The processor has outlived its patch.
        return (numbering.stock_of(number) or Stock(is_dispatched))(call)
    if torch._C._len_torch_function_stack() and skips_scores():
        return group.leave(call, group.run.site, "diffusers skips its scores for guidance")
    return group.attend(call, group.run.site, key=kind)[0]


def skips_scores() -> bool:
    """Whether diffusers is replacing torch's SDPA by its values, which guidance with perturbed attention does."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode as mode

    return any(isinstance(each, mode) for each in torch.overrides._get_current_function_mode_stack())
