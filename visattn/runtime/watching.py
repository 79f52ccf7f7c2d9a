"""Shows a call to the watcher of a handle."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from visattn.layout import Layout
from visattn.patterns import Dense, Pattern
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import carry_bias, key_validity
from visattn.runtime.run import Run
from visattn.watch import Watched


def show(
    run: Run,
    site: str,
    pattern: Pattern,
    call: AttentionCall,
    out: torch.Tensor,
    layouts: tuple[Layout, ...],
    keys: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
) -> None:
    """Show a call that ran its pattern, or was to be dense, to the handle's watcher.

    Args:
        run: The state of the model, with a watcher.
        site: Path of the module.
        pattern: Its pattern.
        call: The call.
        out: What it returned.
        layouts: Where its tokens sit, of each sample where they differ; () if it was dense.
        keys: Valid keys or a bias, see `key_validity`.
        parameters: Learnable parameters of the pattern.
    """
    q, k, v = call.tensors
    if k.shape[1] != q.shape[1] or any(layout.key_layout is not None for layout in layouts):
        # A map has as many rows as columns.
        return
    if not layouts:
        valid = key_validity(call.mask, q, run.mask_row)
        if isinstance(valid, str):
            return
        pattern, layouts, keys, parameters = Dense(), (Layout(q.shape[1]),), valid, {}
    if keys is not None and keys.dtype != torch.bool:
        q, k, _ = carry_bias(q, k, v, keys, call.factor)
        keys = None
    assert run.watcher is not None
    forward = run.forward
    step = None if forward is None else forward.step
    run.watcher(Watched(site, q, k, v, out, pattern, layouts, call.factor, keys, parameters, step))
