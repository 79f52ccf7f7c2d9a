"""Attention maps of swapped modules, for hooks on the dropout that their own attention passes its weights through."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from visattn.kernels.rows import attention_rows
from visattn.patterns import MergingPattern
from visattn.problem import Call


def show_weights(attention: nn.Module | None, path: str, q: torch.Tensor, k: torch.Tensor, call: Call) -> None:
    """Pass the weights [B, H, S, S] of a call through the module's attn_drop, if a hook waits there.

    As in timm, only where fused attention is off (timm.layers.set_fused_attn(False), or the module's fused_attn):
    the weights are dense, and nobody should pay for them by accident. Warns if the call has none to show.

    Args:
        attention: The module, or None.
        path: Its name in the model.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        call: What was computed from them.
    """
    drop = getattr(attention, "attn_drop", None)
    if not isinstance(drop, nn.Module) or getattr(attention, "fused_attn", False):
        return
    if not (drop._forward_hooks or drop._forward_pre_hooks):
        return
    if call.rpb is not None or isinstance(call.pattern, MergingPattern):
        why = "adds a position bias of pairs" if call.rpb is not None else "merges tokens"
        warnings.warn(f"hooks of {path}: {call.pattern} {why} and gives no attention maps", stacklevel=2)
        return
    given = {"parameters": call.parameters, "scale": call.scale, "key_mask": call.key_mask}
    drop(attention_rows(q, k, call.pattern, call.layout, range(q.shape[1]), **given))
