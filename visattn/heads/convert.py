"""`convert_heads()`: fewer query heads and shared key heads in a pretrained model, and the handle that undoes it."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from visattn.given import said
from visattn.heads.fused import Unfusable, is_fused
from visattn.heads.linears import ALLOCATIONS, Shared
from visattn.heads.mixing import channels, columns, head_norms, rows
from visattn.heads.sites import Site, Slot, Stream, find_sites
from visattn.selectors import Layers

# Heads to keep: merged by their mean, or the ones whose output weighs the most.
CHOICES = ("mean", "norm")


# An attribute of layers that a conversion made.
MARK = "visattn_converted"
# What classes of diffusers call to make one layer of three, and where a module has no such attribute of its own.
FUSE, NOTHING = "fuse_projections", object()


class Change(NamedTuple):
    """An attribute that a conversion set: whose, its name, what was there, and what is there now."""

    owner: Any
    name: str
    before: Any
    made: Any


class Converted(NamedTuple):
    """What became of one attention module.

    Attributes:
        path: Its path.
        heads: Query heads before and after.
        kv_heads: Key heads after; before there were as many as query heads.
        parameters: Numbers in its projections before and after.
        why: Why it was left as it was, empty if it was converted.
    """

    path: str
    heads: tuple[int, int]
    kv_heads: int
    parameters: tuple[int, int]
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"{self.path}: left as it was, {self.why}"
        (before, after), numbers_ = self.heads, self.parameters
        return (
            f"{self.path}: {before} query heads -> {after}, key heads {before} -> {self.kv_heads}, parameters of its "
            f"projections {numbers_[0]:,} -> {numbers_[1]:,}"
        )


@dataclass(frozen=True)
class Wanted:
    """What `convert_heads` was asked for, as checked.

    Attributes:
        query_heads: Query heads, or their share; None for all.
        kv_heads: Key heads, or their share of the query heads before; None for as many as query heads.
        by: "mean", "norm", or heads to keep by the path of a module.
        allocation: Who gives query heads to key heads.
    """

    query_heads: int | float | None
    kv_heads: int | float | None
    by: str | Mapping[str, Sequence[int]]
    allocation: str

    def counts(self, site: Site) -> tuple[int, int]:
        """Query and key heads of a module afterwards.

        Raises:
            ValueError: If it cannot have so many.
        """
        queries = _count(self.query_heads, site, "query_heads")
        keys = queries if self.kv_heads is None else _count(self.kv_heads, site, "kv_heads")
        if keys > queries or (self.allocation == "even" and queries % keys):
            raise ValueError(
                f"{site.name.path} would have {queries} query heads and kv_heads={keys}, which must divide them"
                f"{' or be given out by norms' if keys <= queries else ''}"
            )
        if self.by == "mean" and site.heads % queries:
            raise ValueError(
                f"{site.name.path} has {site.heads} heads, of which no {queries} are the means of equal groups: give a "
                "divisor, or by='norm' to keep the ones that weigh the most"
            )
        return queries, keys


class HeadConversion:
    """A converted model: what changed, and the way back. Also a context manager that undoes it at its end.

    Attributes:
        modules: What became of each attention module, in the order of the model.
    """

    def __init__(self, modules: tuple[Converted, ...], undo: Sequence[Change]) -> None:
        self.modules = modules
        self._undo = list(undo)

    def __str__(self) -> str:
        before, after = (sum(m.parameters[i] for m in self.modules) for i in (0, 1))
        lines = [str(module) for module in self.modules]
        return "\n".join([*lines, f"all: parameters of projections {before:,} -> {after:,}"])

    def remove(self) -> None:
        """Put the original layers back, by identity, with device and dtype of those in their place.

        Projections that were fused since are fused anew, of the original ones. A second call does nothing. Remove the
        handle of an `apply` whose pattern has parameters before: they are of the fewer heads.

        Raises:
            ValueError: If the model was converted again since: what was made last is removed first.
        """
        for owner, name, _, made in self._undo:
            there = getattr(owner, name)
            if there is not made and getattr(there, MARK, False):
                raise ValueError(f"{name} was converted again since: remove() what convert_heads gave last first")
        fused = [owner for owner in {id(c.owner): c.owner for c in self._undo}.values() if is_fused(owner)]
        for module in fused:
            if hasattr(module, "unfuse_projections"):
                module.unfuse_projections()
        while self._undo:
            owner, name, value, _ = self._undo.pop()
            if value is NOTHING:
                owner.__dict__.pop(name, None)
                continue
            if isinstance(value, nn.Module):
                there = getattr(owner, name)
                value.to(there.weight.device, there.weight.dtype)
            setattr(owner, name, value)
        for module in fused:
            module.fuse_projections()

    def __enter__(self) -> HeadConversion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def convert_heads(
    model: nn.Module,
    query_heads: int | float | None = None,
    kv_heads: int | float | None = None,
    *,
    by: str | Mapping[str, Sequence[int]] = "mean",
    allocation: str = "even",
    layers: Layers = None,
) -> HeadConversion:
    """Give the self-attention of a pretrained model fewer query heads, or key heads that several query heads share.

    Attention's time falls with the query heads, with every pattern and engine (Sparse Query Attention); shared key
    heads save weights and projections. The result is a model to distil or fine-tune, not one to use as it is:
    `scripts.distill.classifier` and `scripts.distill.pipeline` take the same settings. Convert before `apply`.

    Sources: Filipek, "Sparse Query Attention" (2025), for fewer query heads; Ainslie et al., "GQA" (EMNLP 2023),
    section 2.1, for mean-pooled key and value heads; Khan et al., "Beyond Uniform Query Distribution: Key-Driven
    Grouped Query Attention" (2024), for `allocation`. Merging query heads is ours: queries, keys and values are means,
    and the output projection is the sum, so that heads that are alike are merged exactly.

    Args:
        model: A timm ViT (modules with `qkv` and `proj`), or a model of diffusers with `to_q`, `to_k`, `to_v`.
        query_heads: Query heads of each module, or a share of them like 0.5; None to leave them.
        kv_heads: Key and value heads, or a share of the query heads there were; None for one for each query head.
        by: "mean" merges groups of neighbouring heads, "norm" keeps the heads whose product of value and output
            projection has the greatest Frobenius norm; a mapping from paths of modules to heads keeps those.
        allocation: "even" gives each key head equally many neighbouring query heads; "norms" gives them out in each
            forward by the norms of the keys, over all samples of the batch (KDGQA); "moving" by a moving mean of these
            norms over the training forwards, kept in a buffer (DGQA with its moving average; there the rounding is
            repaired at random, here always alike).
        layers: Layers to convert, as for `apply`; None for all.

    Returns:
        What changed; it undoes the conversion.

    Raises:
        ValueError: If the model has no such module, is patched or fused, or a number does not fit its heads.
    """
    wanted = Wanted(query_heads, kv_heads, by, allocation)
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise ValueError(f"allocation={said(allocation)} must be one of {', '.join(ALLOCATIONS)}")
    if by not in CHOICES if isinstance(by, str) else not isinstance(by, Mapping):
        raise ValueError(f"by={said(by)} must be one of {', '.join(CHOICES)}, or heads to keep by path")
    if query_heads is None and kv_heads is None:
        raise ValueError("neither query_heads nor kv_heads is given: say which of them are to be fewer")
    if query_heads is None and isinstance(by, Mapping):
        raise ValueError("by names heads to keep, of which query_heads says how many: give both, or leave by out")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no module: pass a model, like pipe.transformer or pipe.unet")
    model = getattr(model, "_orig_mod", model)
    sites = find_sites(model, layers)
    if isinstance(by, Mapping):
        _check_paths(by, [site.name.path for site in find_sites(model, None)])
    _check_plain(site.module for site in sites)
    chosen = [(site, _refusal(site, wanted)) for site in sites]
    if all(why for _, why in chosen):
        raise ValueError(f"nothing in {type(model).__name__} can be converted so: {chosen[0][1]}")
    # Everything is computed before anything is put into the model.
    made = [(site, why, [] if why else list(_changes(site, wanted))) for site, why in chosen]
    return _install(made, wanted)


def _install(made: list[tuple[Site, str, list[tuple[Slot, nn.Module]]]], wanted: Wanted) -> HeadConversion:
    undo: list[Change] = []
    found = []
    for site, why, changes in made:
        slots = [slot for stream in site.streams for slot in _slots(stream)]
        before = _size(slots)
        if why:
            found.append(Converted(site.name.path, (site.heads, site.heads), site.heads, (before, before), why))
            continue
        for slot, layer in changes:
            where, _, name = slot.path.rpartition(".")
            undo.append(Change(slot.owner.get_submodule(where), name, slot.layer, layer))
            setattr(layer, MARK, True)
            slot.put(layer)
        queries, keys = wanted.counts(site)
        if keys < queries and hasattr(site.module, FUSE):
            refusal = Unfusable(site.name.path)
            undo.append(Change(site.module, FUSE, site.module.__dict__.get(FUSE, NOTHING), refusal))
            setattr(site.module, FUSE, refusal)
        for names, value in zip(site.counts, (queries, queries * site.head_dim), strict=True):
            for name in names:
                if hasattr(site.module, name):
                    undo.append(Change(site.module, name, getattr(site.module, name), value))
                    setattr(site.module, name, value)
        found.append(Converted(site.name.path, (site.heads, queries), keys, (before, _size(slots))))
    return HeadConversion(tuple(found), undo)


def _slots(stream: Stream) -> Iterator[Slot]:
    yield from (slot for slot in (stream.q, stream.k, stream.v, stream.out, *stream.norms) if slot is not None)


def _size(slots: list[Slot]) -> int:
    return sum(p.numel() for slot in slots for p in slot.layer.parameters())


def _count(value: int | float | None, site: Site, name: str) -> int:
    """So many heads of a module, or such a share of them."""
    if value is None:
        return site.heads
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    share = good and not isinstance(value, numbers.Integral)
    number = value * site.heads if share else value
    if not good or number != int(number) or not 1 <= number <= site.heads:
        raise ValueError(
            f"{name}={said(value)} must be a whole number from 1 to the {site.heads} heads of {site.name.path}, or a "
            "share like 0.5 that is one"
        )
    return int(number)


def _check_paths(by: Mapping[str, Sequence[int]], paths: list[str]) -> None:
    unknown = [path for path in by if path not in paths]
    if unknown:
        raise ValueError(f"by has heads for {unknown[0]!r}, which is none of the modules: {', '.join(paths)}")


def _check_plain(modules: Any) -> None:
    """Raise a ValueError if something stands for the layers that would be converted."""
    for module in modules:
        if is_fused(module):
            raise ValueError(
                "the projections of the model are fused, and those that would be converted are not used: call "
                "unfuse_qkv_projections() first"
            )
        lease = getattr(getattr(module, "processor", None), "__dict__", {}).get("_visattn_lease")
        if "visattn_site" in getattr(module, "__dict__", {}) or (lease is not None and lease.owner is not None):
            raise ValueError("the model is patched: remove() the handle of apply() first, convert, and apply again")


def _refusal(site: Site, wanted: Wanted) -> str:
    """Why a module stays as it is, empty if it can be converted."""
    queries, keys = wanted.counts(site)
    if queries < site.heads and (site.rigid or any(stream.out is None for stream in site.streams)):
        return site.rigid or "its text has no output projection"
    if keys < queries and wanted.allocation != "even" and len(site.streams) > 1:
        return f"allocation={wanted.allocation!r} would give text and grid other key heads"
    return ""


def _changes(site: Site, wanted: Wanted) -> Iterator[tuple[Slot, nn.Module]]:
    """The new layers of a module, and where they go."""
    queries, keys = wanted.counts(site)
    kept = _kept(site, wanted, queries)
    shared = keys < queries
    pooled = torch.eye(queries, dtype=torch.float64, device="cpu")
    if shared:
        owner = torch.arange(queries, device="cpu") * keys // queries
        pooled = torch.nn.functional.one_hot(owner, keys).T.double()
        pooled = pooled / pooled.sum(1, keepdim=True)
    for stream in site.streams:
        mixes = {"q": kept, "kv": pooled @ kept}
        if stream.k is None or stream.v is None:
            parts = torch.block_diag(mixes["q"], mixes["kv"], mixes["kv"])
            layer = _shared(stream.q.layer, site, (queries, keys), wanted, True) if shared else None
            yield stream.q, rows(stream.q.layer, parts, site.head_dim, layer)
        else:
            if queries < site.heads:
                yield stream.q, rows(stream.q.layer, kept, site.head_dim)
            made = []
            for slot in (stream.k, stream.v):
                layer = _shared(slot.layer, site, (queries, keys), wanted, False) if shared else None
                made.append(rows(slot.layer, mixes["kv"], site.head_dim, layer))
                yield slot, made[-1]
            if shared and wanted.allocation != "even":
                made[1].keys = (made[0],)
        if queries < site.heads:
            assert stream.out is not None
            yield stream.out, columns(stream.out.layer, (kept > 0).double(), site.head_dim)
            for slot in stream.norms:
                yield slot, channels(slot.layer, kept, site.head_dim)


def _kept(site: Site, wanted: Wanted, queries: int) -> torch.Tensor:
    """What each new head is of the old ones: [new, old], rows sum to 1."""
    heads = site.heads
    if queries == heads:
        return torch.eye(heads, dtype=torch.float64, device="cpu")
    if wanted.by == "mean":
        return (
            torch.eye(queries, dtype=torch.float64, device="cpu").repeat_interleave(heads // queries, 1)
            * queries
            / heads
        )
    if isinstance(wanted.by, str):
        index = head_norms(site).topk(queries).indices.sort().values
    else:
        given = wanted.by.get(site.name.path)
        try:
            named = sorted(operator.index(head) for head in given)  # type: ignore[union-attr]
        except TypeError:
            named = []
        if not len(set(named)) == len(named) == queries or not all(0 <= head < heads for head in named):
            raise ValueError(
                f"by={given!r} for {site.name.path} must name {queries} of its heads, from 0 to {heads - 1}, each once"
            )
        index = torch.tensor(named, device="cpu")
    return torch.eye(heads, dtype=torch.float64, device="cpu")[index]


def _shared(layer: nn.Linear, site: Site, heads: tuple[int, int], wanted: Wanted, fused: bool) -> Shared:
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    sides = layer.in_features, site.head_dim
    return Shared(sides, heads, wanted.allocation, fused, layer.bias is not None, **options)
