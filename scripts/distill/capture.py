"""What a pipeline tells its denoiser: recorded in the first step, to be told again in training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.pipelines.families import find_family
from visattn.pipelines.patch.targets import DENOISERS

TIME = "timestep"


@dataclass(frozen=True)
class Told:
    """The denoiser's arguments for the samples of one pipeline call.

    Attributes:
        tensors: Of each sample, [samples, rows, ...].
        constants: Tensors that are the same for all.
        plain: Numbers, texts and truth values.
        time_scale: The denoiser's time by the scheduler's.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    plain: dict[str, Any]
    time_scale: float


def find_denoiser(pipe: Any) -> tuple[str, torch.nn.Module, str]:
    """Name of the component that denoises, the model, and the argument that carries its latents.

    Raises:
        ValueError: If the pipeline has not exactly one, or visattn does not know its class.
    """
    models = [(name, getattr(pipe, name, None)) for name in DENOISERS]
    found = [(name, model) for name, model in models if isinstance(model, torch.nn.Module)]
    if len(found) != 1:
        raise ValueError(f"{type(pipe).__name__} has {len(found)} denoising models: distillation takes one teacher")
    name, model = found[0]
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is no model class that visattn.apply knows: `visattn models` lists them"
        )
    return name, model, family.anchor


@dataclass
class Capture:
    """Records one pipeline call; use it as a context, and pass `step_end` to the pipeline.

    Attributes:
        model: The denoiser.
        anchor: Its argument with the noisy latents.
        calls: Arguments of its calls in the first step.
        latents: Latents after the last step so far.
        first_time: The scheduler's first time.
    """

    model: torch.nn.Module
    anchor: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    latents: torch.Tensor | None = None
    first_time: float = 0.0

    def __enter__(self) -> Capture:
        self._signature = inspect.signature(self.model.forward)
        self._hook = self.model.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *unused: Any) -> None:
        self._hook.remove()

    def _record(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.latents is None:
            self.calls.append(dict(self._signature.bind(*args, **kwargs).arguments))

    def step_end(self, pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`."""
        if step == 0:
            self.first_time = float(time)
        self.latents = tensors["latents"].detach()
        return {}

    def told(self, latents: torch.Tensor) -> Told:
        """What the calls of the first step have in common and in what they differ.

        Args:
            latents: Of the samples, as the denoiser takes them.

        Raises:
            ValueError: If the denoiser works on something else than the latents of the samples.
        """
        assert self.calls, "the pipeline has not run"
        parts = [_sort(call, self.anchor, latents) for call in self.calls]
        tensors = {name: torch.cat([part[0][name] for part in parts], 1) for name in parts[0][0]}
        scale = float(self.calls[0][TIME].flatten()[0]) / self.first_time
        return Told(tensors, parts[0][1], parts[0][2], scale)


def _sort(
    call: dict[str, Any], anchor: str, latents: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Arguments of one call: of each sample [samples, rows, ...], constant tensors, plain values."""
    noisy, samples = call[anchor], len(latents)
    if not isinstance(noisy, torch.Tensor) or noisy.shape[1:] != latents.shape[1:] or len(noisy) % samples:
        shape = list(noisy.shape) if isinstance(noisy, torch.Tensor) else type(noisy).__name__
        raise ValueError(f"the denoiser got {shape} for latents {list(latents.shape)}: such pipelines cannot be cached")
    own, constants, plain = {}, {}, {}
    for name, value in _flat({k: v for k, v in call.items() if k not in (anchor, TIME, "return_dict")}):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(noisy) and not name.endswith("ids"):
            own[name] = value.unflatten(0, (-1, samples)).transpose(0, 1)
        elif isinstance(value, torch.Tensor):
            constants[name] = value
        elif isinstance(value, (bool, int, float, str)):
            plain[name] = value
        elif value is not None:
            raise ValueError(f"the denoiser's argument {name} is a {type(value).__name__}: it cannot be cached")
    return own, constants, plain


def _flat(arguments: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
