"""One attention call of a model whose tokens processes share in slabs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from visattn.layout import Layout
from visattn.parallel import Moved, Slabs, halo_attention, refusal, ulysses_attention
from visattn.patterns import Dense, Pattern
from visattn.patterns.choice.memory import placing
from visattn.pipelines.patch.decision import Cut
from visattn.pipelines.patch.group import Group
from visattn.problem import Call, Problem
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.verdict import Verdict


class Shared(NamedTuple):
    """What ran of a call that processes share.

    Attributes:
        pattern: The pattern.
        layouts: Where the tokens of all processes sit; empty if every process ran the stock attention by itself.
        cut: How they are cut, None likewise.
    """

    pattern: Pattern
    layouts: tuple[Layout, ...] = ()
    cut: Cut | None = None


def attend_on_slabs(group: Group, call: AttentionCall, compiled: bool = False) -> tuple[torch.Tensor, Shared]:
    """Attention [B, S, H, D] of this process's queries to the keys of all, and what ran.

    Args:
        group: Whose call it is.
        call: The call.
        compiled: Whether compiled code makes it, which does not know the module.

    Raises:
        ValueError: If the call cannot run on slabs at all: nothing else would be right there.
    """
    run = group.run
    sharding, site, forward = run.sharding, None if compiled else run.site, run.forward
    assert sharding is not None
    if forward is None or call.q.shape[1] != call.k.shape[1]:
        # Cross-attention: every process has all keys.
        why = "called outside of the model's forward" if forward is None else ""
        return group.leave(call, site, why), Shared(Dense())
    slabs = _local_layout(sharding.slabs(call.k.shape[1], local=True), forward, sharding.rank)
    keys = _valid_keys(group, call, site)
    dense = forward.dense or isinstance(group.pattern, Dense)
    pattern = Dense() if dense else group.pattern
    fetches = _fetches(group, call, slabs, dense, site)
    verdict = _verdict(group, call, slabs, dense, keys is not None)
    name = site or group.unnamed
    cells = verdict.cells(run.tally, name, call.q.device)
    begun = run.tally.begin(cells[0])
    moved = Moved()
    with run.tally.hearing(cells, begun), placing(run.place(name, pattern)):
        out = _attend(call, pattern, slabs, fetches, sharding.group, keys, "auto" if dense else group.backend, moved)
    run.tally.end(cells, begun)
    run.moved[name] += moved.sent + moved.shared
    group.note(forward, name, verdict)
    cut = Cut(slabs.axis, slabs.sizes, fetches, (sharding.group or dist.group.WORLD).group_name)  # type: ignore[union-attr]
    return out, Shared(pattern, (slabs.layout,), cut)


def attend_again(
    call: AttentionCall, pattern: Pattern, layout: Layout, cut: Cut, backend: str, keys: torch.Tensor | None
) -> torch.Tensor:
    """The attention of a call that `attend_on_slabs` has run; every process makes this call."""
    group = dist.distributed_c10d._resolve_process_group(cut.group)  # type: ignore[arg-type]
    slabs = Slabs(layout, cut.axis, cut.sizes)
    return _attend(call, pattern, slabs, cut.fetches, group, keys, backend)


def _attend(
    call: AttentionCall,
    pattern: Pattern,
    slabs: Slabs,
    fetches: bool,
    group: dist.ProcessGroup | None,
    keys: torch.Tensor | None,
    backend: str,
    moved: Moved | None = None,
) -> torch.Tensor:
    attend = halo_attention if fetches else ulysses_attention
    options: dict[str, Any] = {"group": group, "scale": call.factor, "key_mask": keys, "moved": moved}
    return attend(*call.tensors, pattern, slabs, backend=backend, **options)


def _valid_keys(group: Group, call: AttentionCall, site: str | None) -> torch.Tensor | None:
    """Which keys of this process may be attended, None for all.

    Raises:
        ValueError: If the call says more of them than that.
    """
    run = group.run
    keys = key_validity(call.mask, call.q, run.mask_row)
    if isinstance(keys, str) or (keys is not None and keys.dtype != torch.bool) or call.causal or call.dropout:
        why = keys if isinstance(keys, str) else "its mask is a bias, or it is causal or has dropout"
        how = None if run.sharding is None else run.sharding.how
        raise ValueError(f"{site or 'attention'} of {run.name} cannot run under parallel={how!r}: {why}")
    return keys


def _fetches(group: Group, call: AttentionCall, slabs: Slabs, dense: bool, site: str | None) -> bool:
    """Whether keys are fetched, rather than tokens exchanged for heads.

    Raises:
        ValueError: If neither can be as `parallel=` says.
    """
    sharding = group.run.sharding
    assert sharding is not None
    why = "" if dense else refusal(group.pattern, slabs)
    if sharding.how == "halo" and why:
        raise ValueError(f"{group.pattern} under parallel='halo': {why}")
    few = call.k.shape[2] < sharding.ranks
    if few and sharding.how == "ulysses" and not dense:
        raise ValueError(
            f"{site or 'attention'} of {group.run.name} has {call.k.shape[2]} key heads for {sharding.ranks} "
            "processes: use parallel='halo' or fewer processes"
        )
    return few if dense else sharding.how == "halo"


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
