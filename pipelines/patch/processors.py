"""The processors of one patched model: installed, kept installed, and undone wherever they have gone."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from visattn.patterns import MergingPattern
from visattn.pipelines.patch import clones, dispatch, members, merging
from visattn.pipelines.patch.calling import Calling, calling_of, own_attention, stock_of
from visattn.pipelines.patch.group import Group
from visattn.pipelines.patch.run import DiffusersRun
from visattn.pipelines.patch.sites import Site
from visattn.pipelines.patch.stock import Stock
from visattn.schedule import Given


class _Set(NamedTuple):
    """What a module calls, in the fewest objects: all are looked at before each forward.

    Attributes:
        where: The module's own dictionary that has its processor.
        installed: The processor.
        backend: What its backend is if that is how it calls a group, else None.
    """

    where: dict[str, Any]
    installed: Any
    backend: Any

    @classmethod
    def of(cls, site: Site) -> _Set:
        """Of a module that calls its group."""
        modules: dict[str, Any] = site.module._modules
        where = modules if "processor" in modules else site.module.__dict__
        backend = site.installed._attention_backend if clones.calls_by_backend(site.installed) else None
        return cls(where, site.installed, backend)


class Processors:
    """Every processor that a patch has made or changed."""

    def __init__(self, model: torch.nn.Module, run: DiffusersRun, sites: Sequence[Site], backend: str) -> None:
        self._model, self._run, self._sites, self._backend = model, run, sites, backend
        self._groups: dict[tuple[Given, str | None, Stock, str], Group] = {}
        # Weak: a client may let one go that it had put in.
        self._ours: list[weakref.ref[Any]] = []
        self._set: list[_Set] = []

    def install(self) -> None:
        """Make the modules call their groups.

        Raises:
            ValueError: If none of them can: all compute attention themselves.
        """
        own = [own_attention(clones.original_of(site.module.processor)) for site in self._sites]
        if all(own):
            raise ValueError(
                f"{own[0]}: set processors that call it, such as AttnProcessor2_0, or leave these layers out with "
                "layers="
            )
        self._install(self._sites)

    def repair(self, repaired: Callable[[], None]) -> None:
        """Patch modules again whose processor or backend was set by someone else, and call `repaired` after it."""
        for where, installed, backend in self._set:
            if where.get("processor") is not installed:
                break
            if backend is not None and installed._attention_backend is not backend:
                break
        else:
            return
        broken = [site for site in self._sites if not site.intact and not site.adopt()]
        if not broken:
            self._remember()
            return
        warnings.warn(
            f"{self._run.name}: the attention processor or backend of {len(broken)} patched modules was set after "
            f"apply(): it now computes their dense calls, and the pattern is installed again",
            stacklevel=5,
        )
        self._install(broken)
        repaired()

    def undo(self) -> None:
        """Put back what our processors stand for, and make stock of those that others keep; the rest stays."""
        mine = {id(processor) for reference in self._ours if (processor := reference()) is not None}
        for module in self._model.modules():
            processor = getattr(module, "processor", None)
            if id(processor) in mine and clones.is_clone(processor):
                module.processor = clones.original_of(processor)
        # diffusers keeps processors here while projections are fused.
        saved = getattr(self._model, "original_attn_processors", None)
        if isinstance(saved, dict):
            saved.update({k: clones.original_of(p) for k, p in saved.items() if id(p) in mine})
        for reference in self._ours:
            processor = reference()
            if processor is not None:
                clones.make_stock(processor)
        self._ours.clear()
        self._set.clear()
        for site in self._sites:
            site.group = site.installed = None
        for group in self._groups.values():
            group.release()
        self._groups.clear()
        members.unregister_members()

    def _install(self, sites: Sequence[Site]) -> None:
        users = Counter(id(clones.original_of(m.processor)) for m in self._model.modules() if hasattr(m, "processor"))
        for site in sites:
            found: Any = site.module.processor
            processor = self._unpatched(found)
            site.group = group = self._group(site, stock_of(processor))
            place = clones.Place(self._run.here, site.name.path, site.index, weakref.ref(site.module))
            if isinstance(site.pattern, MergingPattern):
                site.installed = merging.clone(processor, group.lease, place)
            elif calling_of(processor) is not Calling.MEMBER:
                site.installed = clones.clone(processor, group.lease, place)
            else:
                # A processor that serves other modules too must stay as it is.
                site.installed = clones.give_member(processor, group.lease, shared=users[id(processor)] > 1)
            if not any(reference() is site.installed for reference in self._ours):
                self._ours.append(weakref.ref(site.installed))
            site.module.processor = site.installed
        self._remember()

    def _remember(self) -> None:
        """Remember what is set, so that a look at each module tells before a forward whether it still is."""
        self._set = [_Set.of(site) for site in self._sites]

    def _unpatched(self, processor: Any) -> Any:
        """What a processor stands for that was ours, or is of a patch that is gone."""
        original = clones.original_of(processor)
        if original is not processor and calling_of(original) is Calling.MEMBER:
            clones.make_stock(processor)
        lease = clones.lease_of(original)
        if lease is not None and (lease.owner is None or lease.owner in self._groups.values()):
            clones.make_stock(original)
        return original

    def _group(self, site: Site, stock: Stock) -> Group:
        pattern = site.pattern
        # Compiled code knows groups, not modules: one with parameters of its own needs a group of its own.
        key = pattern, site.precision, stock, site.name.path if site.parameters is not None else ""
        if key not in self._groups:
            arguments = self._run, pattern, self._backend, stock, site.parameters, site.precision
            merges = isinstance(pattern, MergingPattern)
            self._groups[key] = group = merging.MergingGroup(*arguments) if merges else Group(*arguments)
            if stock.dispatched:
                members.register_member(group.number, dispatch.dispatched)
        return self._groups[key]
