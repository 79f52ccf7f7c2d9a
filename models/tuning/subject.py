"""A timm model on pictures as the subject of a search."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from visattn.environment import cpu_name, versions
from visattn.handle import apply
from visattn.models.swap.install import own_grid
from visattn.models.swap.sites import find_sites
from visattn.models.tuning.pictures import Pictures
from visattn.schedule import Schedule
from visattn.tuning.candidates import HOPELESS, is_steady
from visattn.tuning.places import Only, by_layer, names_at
from visattn.tuning.subject import DENSE, Assignment, Local, Outcome

# Measurements of the time of a candidate, and of a schedule.
TURNS = 3


class BackboneSubject:
    """See `visattn.tuning.subject.Subject`. A run has one step.

    The error of a candidate at a layer is that of the model's output, with all other layers dense. Times of attention
    are those of its modules with their projections, which a dense module shares with a swapped one.
    """

    measure = "snr"
    steps = 1

    def __init__(
        self,
        model: nn.Module,
        pictures: Pictures,
        name: str = "",
        batch: int = 8,
        only: Only = MappingProxyType({}),
    ) -> None:
        """Look at a model.

        Args:
            model: The model.
            pictures: What it sees.
            name: As it was asked for.
            batch: Pictures at once.
            only: Candidates that are for some layers alone, see `visattn.tuning.places`.

        Raises:
            ValueError: If its attention cannot be swapped, it does not say on which grid its tokens sit, or it has no
                layer that a candidate is for.
        """
        self._net, self.pictures, self.name, self.batch = model.eval(), pictures, name, batch
        self.model = type(model).__name__
        sites = find_sites(model, self.model)
        self._layers = list(dict.fromkeys(site.name.layer for site in sites))
        self._only = by_layer(only, self._layers, {site.name.path: site.name.layer for site in sites})
        self._modules = [[s.module for s in sites if s.name.layer == layer] for layer in self._layers]
        self.layers, self.parameters = len(self._layers), sum(each.numel() for each in model.parameters())
        grid = own_grid(model)
        if grid is None:
            raise ValueError(
                f"{self.model} does not say on which grid its tokens sit, so no schedule can be tuned for it"
            )
        self.grid = grid
        self.device = next(model.parameters()).device
        self._twins: dict[tuple[int, ...], torch.Tensor] = {}
        self._warm: set[tuple[str, int]] = set()

    def about(self) -> dict[str, Any]:
        """See `Subject.about`."""
        on_gpu = self.device.type == "cuda"
        return {
            "model": self.name or self.model,
            "grid": list(self.grid),
            "pictures": [self.pictures.name, self.pictures.count],
            "batch": self.batch,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else cpu_name(),
            "dtype": str(next(self._net.parameters()).dtype).removeprefix("torch."),
            "torch": versions()["torch"],
        }

    def local(
        self, step: int, candidates: Sequence[str], seeds: Sequence[int], timed: Collection[str]
    ) -> list[dict[str, Local]]:
        """See `Subject.local`."""
        some = list(seeds)[: self.batch]
        twins, left_out = self.twins(some), set()
        found: list[dict[str, Local]] = []
        for layer in range(self.layers):
            here: dict[str, Local] = {}
            for name in names_at(self._layers[layer], candidates, self._only):
                if name in left_out:
                    continue
                # What runs in the first layer is compiled and planned for all.
                turns = TURNS if layer == 0 else max(1, TURNS - 1)
                try:
                    out, times = self._run({layer: name}, some)
                    runs = [times, *(self._run({layer: name}, some)[1] for _ in range(turns - 1))]
                except (ValueError, RuntimeError) as error:
                    left_out.add(name)
                    warnings.warn(f"candidate {name} is left out: {error}", stacklevel=2)
                    continue
                off = float((out - twins).square().sum() / twins.square().sum())
                here[name] = Local(off, min(each[layer] for each in runs))
                dense = here.get(DENSE)
                if dense and name != DENSE and is_steady(name) and here[name].seconds > HOPELESS * dense.seconds:
                    left_out.add(name)
            found.append(here)
        return [{name: value for name, value in here.items() if name not in left_out} for here in found]

    def outcome(
        self, edges: Sequence[float], assignment: Assignment, seeds: Sequence[int], timed: bool = True
    ) -> Outcome:
        """See `Subject.outcome`."""
        twins, names = self.twins(seeds), {layer: row[0] for layer, row in enumerate(assignment)}
        turns, seconds, attention = TURNS if timed else 1, [], []
        out = twins
        for _ in range(turns + timed):
            whole: list[float] = []
            out, times = self._run(names, seeds, whole)
            seconds.append(sum(whole) / len(seeds))
            attention.append(sum(times) / len(seeds))
        snr = tuple(_snr(one, other) for one, other in zip(out, twins, strict=True))
        return Outcome(snr, (), (), min(seconds), min(attention), *self._lost(out, twins, seeds))

    def twins(self, seeds: Sequence[int]) -> torch.Tensor:
        """Outputs without any pattern [N, ...]."""
        key = tuple(seeds)
        if key not in self._twins:
            self._twins[key] = self._run({}, seeds)[0]
        return self._twins[key]

    def _lost(
        self, out: torch.Tensor, twins: torch.Tensor, seeds: Sequence[int]
    ) -> tuple[tuple[int, ...], float | None]:
        labels = self.pictures.labels
        if labels is None:
            return (), None
        right = torch.tensor([labels[i] for i in self.pictures.of_seeds(seeds)])
        own, others = out.argmax(-1) == right, twins.argmax(-1) == right
        return tuple((others.int() - own.int()).tolist()), float(others.float().mean())

    def _run(
        self, names: dict[int, str], seeds: Sequence[int], whole: list[float] | None = None
    ) -> tuple[torch.Tensor, list[float]]:
        """Outputs [N, ...] on the CPU with patterns at some layers, and the time of each layer's modules.

        Args:
            names: Patterns of layers.
            seeds: Of pictures.
            whole: Gets the time of each batch in the model, without what reads pictures and patches the model.
        """
        chosen = {str(layer): name for layer, name in names.items() if name != DENSE}
        parts = []
        with torch.inference_mode(), self._clocks() as times:
            handle = apply(self._net, Schedule.of(chosen), strict=True) if chosen else None
            try:
                for first in range(0, len(seeds), self.batch):
                    which = self.pictures.of_seeds(seeds)[first : first + self.batch]
                    x = torch.stack([self.pictures.get(i) for i in which])
                    x = x.to(self.device, next(self._net.parameters()).dtype)
                    self._wait()
                    start = time.perf_counter()
                    out = self._net(x)
                    self._wait()
                    if whole is not None:
                        whole.append(time.perf_counter() - start)
                    parts.append(out.float().cpu())
            finally:
                if handle is not None:
                    handle.remove()
        return torch.cat(parts), times

    @contextmanager
    def _clocks(self) -> Iterator[list[float]]:
        """Inside, the time of each layer's attention modules is added up."""
        times, hooks = [0.0] * self.layers, []
        for layer, modules in enumerate(self._modules):
            for module in modules:
                began: list[float] = []

                def before(*_: Any, began: list[float] = began) -> None:
                    self._wait()
                    began.append(time.perf_counter())

                def after(*_: Any, began: list[float] = began, layer: int = layer) -> None:
                    self._wait()
                    times[layer] += time.perf_counter() - began.pop()

                hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield times
        finally:
            for hook in hooks:
                hook.remove()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _snr(one: torch.Tensor, twin: torch.Tensor) -> float:
    off = float((one - twin).square().sum())
    return math.inf if off == 0 else 10 * math.log10(float(twin.square().sum()) / off)
