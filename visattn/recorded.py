"""Queries, keys and values of attention calls in a file, to look at what patterns would list for them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visattn.files import as_path, check_writable_file, read_tensors, written_whole
from visattn.given import mapping, said, several, switch
from visattn.layout import Layout
from visattn.patterns.values import whole_number
from visattn.version import __version__
from visattn.watch import Watched

# Where a file says which tensors are whose.
CALLS = "visattn_calls"
# Bytes of tensors that are recorded at most.
LIMIT = 2**30


class Recorded(NamedTuple):
    """One attention call.

    Attributes:
        site: Path of the module.
        step: Index of the denoising step, None if unknown.
        call: How many calls of this module in this step came before: with guidance in two forwards the second is 1.
        q: Queries [B, S, H, D], on the CPU.
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        layout: Where the tokens sit.
        scale: Factor on the logits.
        key_mask: bool [B, S], or None.
    """

    site: str
    step: int | None
    call: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: Layout
    scale: float
    key_mask: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        found = {"q": self.q, "k": self.k, "v": self.v, "key_mask": self.key_mask}
        return {name: t for name, t in found.items() if t is not None}


def check_recorded(calls: Any, many: bool = False) -> None:
    """Raise a ValueError for what is no recorded call, or are not `many` of them."""
    if many and not isinstance(calls, list | tuple):
        raise ValueError(
            f"calls={said(calls)} must be a list of recorded calls: pass what visattn.maps.calls(...) gave"
        )
    for call in calls if many else (calls,):
        if not isinstance(call, Recorded):
            raise ValueError(
                f"call={said(call)} is no recorded call: pass one of those that visattn.maps.calls(...) gave"
            )


class Recorder:
    """A watcher that keeps calls of some modules and steps, within a limit: `handle.watch(recorder)`.

    Attributes:
        calls: What was kept.
        left_out: Calls that would have gone over the limit.
    """

    def __init__(
        self, modules: Sequence[str] = ("*",), steps: Sequence[int] = (), samples: int = 1, limit: int = LIMIT
    ) -> None:
        """Choose what to keep.

        Args:
            modules: Names of modules, with * for anything.
            steps: Denoising steps; none for all.
            samples: How many of a batch.
            limit: Bytes of all tensors together.

        Raises:
            ValueError: If a number is out of range.
        """
        names = several(modules, "modules", "names of modules, like ['*.attn']")
        wanted = several(steps, "steps", "denoising steps, from 0")
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules={said(modules)} must be a list of names of modules, like ['*.attn']")
        self._modules = tuple(names)
        self._steps = frozenset(whole_number(step, "steps", 0) for step in wanted)
        self._samples = whole_number(samples, "samples", 1)
        self._limit = whole_number(limit, "limit", 1, high=2**63)
        self._bytes = 0
        self._seen: dict[tuple[str, int | None], int] = {}
        self.calls: list[Recorded] = []
        self.left_out = 0

    def __call__(self, watched: Watched) -> None:
        """Keep a call, if it is asked for."""
        if not any(fnmatch.fnmatchcase(watched.site, name) for name in self._modules):
            return
        if self._steps and watched.step not in self._steps:
            return
        at = watched.site, watched.step
        number = self._seen[at] = self._seen.get(at, -1) + 1
        for i, layout in enumerate(watched.layouts):
            some = slice(0, self._samples) if len(watched.layouts) == 1 else slice(i, i + 1)
            if len(watched.layouts) == 1 or i < self._samples:
                self._keep(watched, some, layout, number + i)

    def _keep(self, watched: Watched, some: slice, layout: Layout, number: int) -> None:
        given = [t[some] for t in (watched.q, watched.k, watched.v)]
        mask = None if watched.key_mask is None else watched.key_mask[some]
        size = sum(t.numel() * t.element_size() for t in [*given, *([] if mask is None else [mask])])
        if self._bytes + size > self._limit:
            self.left_out += 1
            return
        self._bytes += size
        q, k, v = (t.detach().to("cpu", copy=True).contiguous() for t in given)
        mask = None if mask is None else mask.to("cpu", copy=True).contiguous()
        self.calls.append(Recorded(watched.site, watched.step, number, q, k, v, layout, watched.scale, mask))


def save_recorded(
    path: str | Path, calls: Sequence[Recorded], about: Mapping[str, Any] | None = None, force: bool = False
) -> None:
    """Write calls to a safetensors file, whole or not at all.

    Args:
        path: The file, .safetensors.
        calls: At least one.
        about: What else to say of them, in JSON's types.
        force: Whether a file that is there may be replaced.

    Raises:
        ValueError: If there is nothing to write, or the file cannot be written.
    """
    from safetensors.torch import save_file

    check_recorded(calls, many=True)
    switch(force, "force")
    if about is not None:
        mapping(about, "about", "of what JSON can hold")
    if not calls:
        raise ValueError("calls is empty, nothing was recorded: choose other modules or steps, or a larger limit")
    checked = check_writable_file(as_path(path), (".safetensors",), force)
    entries, tensors = [], {}
    for i, call in enumerate(calls):
        layout = {"grid": list(call.layout.grid), "prefix": call.layout.prefix, "suffix": call.layout.suffix}
        entries.append({"site": call.site, "step": call.step, "call": call.call, "scale": call.scale} | layout)
        # Queries, keys and values may be parts of one tensor, which the file format takes no two of.
        tensors |= {f"{i}.{name}": t.detach().to("cpu", copy=True).contiguous() for name, t in call.tensors.items()}
    metadata = {"visattn": __version__, CALLS: json.dumps(entries), "about": json.dumps(dict(about or {}))}
    with written_whole(checked) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_recorded(path: str | Path) -> tuple[list[Recorded], dict[str, Any]]:
    """Read what `save_recorded` wrote.

    Returns:
        The calls, and what else was said of them.

    Raises:
        ValueError: If the file is missing or not such a file.
    """
    path = as_path(path)
    tensors, metadata = read_tensors(path, "file of recorded calls", "pass one that `visattn record` wrote")
    if CALLS not in metadata:
        raise ValueError(f"{path} holds no recorded calls: pass a file of `visattn record`")
    found = []
    for i, entry in enumerate(json.loads(metadata[CALLS])):
        layout = Layout(tuple(entry["grid"]), entry["prefix"], entry["suffix"])
        q, k, v = (tensors[f"{i}.{name}"] for name in ("q", "k", "v"))
        mask = tensors.get(f"{i}.key_mask")
        found.append(Recorded(entry["site"], entry["step"], entry["call"], q, k, v, layout, entry["scale"], mask))
    return found, json.loads(metadata["about"])
