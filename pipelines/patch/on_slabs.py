"""One attention call of a model whose tokens processes share in slabs."""

from __future__ import annotations

from typing import Any

import torch

from visattn.layout import Layout
from visattn.parallel import Moved, Slabs, halo_attention, refusal, ulysses_attention
from visattn.patterns import Dense
from visattn.patterns.choice.memory import placing
from visattn.pipelines.patch.group import Group
from visattn.problem import Call, Problem
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.verdict import Verdict


def attend_on_slabs(group: Group, call: AttentionCall) -> torch.Tensor:
    """Attention [B, S, H, D] of this process's queries to the keys of all.

    Raises:
        ValueError: If the call cannot run on slabs at all: nothing else would be right there.
    """
    run = group.run
    sharding, site, forward = run.sharding, run.site, run.forward
    assert sharding is not None
    if forward is None or call.q.shape[1] != call.k.shape[1]:
        # Cross-attention: every process has all keys.
        return group.leave(call, site, "called outside of the model's forward" if forward is None else "")
    layout = _local_layout(sharding.slabs(call.k.shape[1], local=True), forward, sharding.rank)
    keys = key_validity(call.mask, call.q, run.mask_row)
    if isinstance(keys, str) or (keys is not None and keys.dtype != torch.bool) or call.causal or call.dropout:
        why = keys if isinstance(keys, str) else "its mask is a bias, or it is causal or has dropout"
        raise ValueError(f"{site or 'attention'} of {run.name} cannot run under parallel={sharding.how!r}: {why}")
    dense = forward.dense or isinstance(group.pattern, Dense)
    pattern = Dense() if dense else group.pattern
    why = "" if dense else refusal(pattern, layout)
    if sharding.how == "halo" and why:
        raise ValueError(f"{pattern} under parallel='halo': {why}")
    few = call.k.shape[2] < sharding.ranks
    if few and sharding.how == "ulysses" and not dense:
        raise ValueError(
            f"{site or 'attention'} of {run.name} has {call.k.shape[2]} key heads for {sharding.ranks} processes: "
            "use parallel='halo' or fewer processes"
        )
    fetches = few if dense else sharding.how == "halo"
    verdict = _verdict(group, call, layout, dense, keys is not None)
    name = site or group.unnamed
    cells = verdict.cells(run.tally, name, call.q.device)
    begun = run.tally.begin(cells[0])
    attend, moved = (halo_attention if fetches else ulysses_attention), Moved()
    options = {"group": sharding.group, "scale": call.factor, "key_mask": keys, "moved": moved}
    with run.tally.hearing(cells, begun), placing(run.place(name, pattern)):
        out = attend(*call.tensors, pattern, layout, backend="auto" if dense else group.backend, **options)
    run.tally.end(cells, begun)
    run.moved[name] += moved.sent + moved.shared
    group.note(forward, name, verdict)
    return out


def _local_layout(slabs: Slabs, forward: Any, rank: int) -> Slabs:
    """Slabs with the dense tokens on the sides where the forward says that they are."""
    dense = slabs.dense
    found = forward.layouts(slabs.layout.tokens + dense)
    if isinstance(found, str) or len(found) != 1:
        raise ValueError(found if isinstance(found, str) else "samples with grids of their own cannot be cut in slabs")
    return Slabs(Layout(found[0].grid, found[0].prefix, found[0].suffix), slabs.axis, slabs.sizes)


def _verdict(group: Group, call: AttentionCall, slabs: Slabs, dense: bool, masked: bool) -> Verdict:
    if dense:
        return Verdict("dense", shapes=(call.q.shape, call.k.shape, call.q.dtype))
    problem = Problem.of(*call.tensors, Call(group.pattern, slabs.layout, call.factor))
    return Verdict("sparse", (slabs.layout,), group.backend, (problem,))
