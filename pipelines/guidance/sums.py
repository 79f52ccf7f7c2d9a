"""How the pipeline that runs adds up its predictions, from what it holds while it calls its model.

Pipelines guide by `u + s (c - u)`: c is predicted with the prompt, u without it. Some stack [u, c] in one batch, others
call the model twice, and distilled models predict c alone. A correction d of the sum is made in c: `c + d / s`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from visattn.pipelines.patch.schedulers import running_pipeline

# How the names of pipelines begin whose sum is c + s (c - u), so that c counts 1 + s times.
FROM_PROMPT = ("Cosmos2", "CosmosT", "CosmosV", "Kandinsky3", "Krea2", "ZImage")
# Those that stack [c, u].
PROMPT_FIRST = ("DiT", "Lumina", "OmniGen", "Pixel", "StableCascade", "Wuerstchen", "ZImage")
# Packages whose pipelines were read: where what they stack does not tell, their names do.
READ = ("diffusers", "visattn")
GENERAL = ("DiffusionPipeline", "ModularPipeline")
UNCONDITIONAL = "uncond"


class Sum(NamedTuple):
    """What a call of the model is in the pipeline's sum.

    Attributes:
        factor: How often c counts in the sum, 1 without u.
        half: Which samples of its batch are c.
    """

    factor: float
    half: slice = slice(None)


def read_sum(model: torch.nn.Module, given: Mapping[str, Any], batch: int, context: str | None) -> Sum | None:
    """What the call that is running is, None if it predicts without the prompt.

    Args:
        model: The model that is called.
        given: Its arguments by name.
        batch: Samples of the call.
        context: What the pipeline calls it (`model.cache_context`), None if it does not.

    Raises:
        ValueError: If no pipeline is calling the model, or it does not tell.
    """
    found = running_pipeline(model)
    if found is None:
        raise ValueError(
            f"guide: no pipeline is calling {type(model).__name__}, so nothing tells which of its calls have the "
            "prompt: run the pipeline that guide() was given"
        )
    pipeline, frame = found
    names = frame.f_locals
    if context is not None and context.startswith(UNCONDITIONAL):
        return None
    _check(pipeline, names)
    scale = _scale(pipeline, names)
    from_prompt = _is_one_of(pipeline, FROM_PROMPT)
    if scale is None or (from_prompt and scale == 0):
        return Sum(1.0)
    factor = scale + 1.0 if from_prompt else scale
    if context is not None and UNCONDITIONAL not in context:
        return Sum(factor)
    latents = names.get("latents")
    samples = len(latents) if isinstance(latents, torch.Tensor | list) else None
    if samples is not None and batch == 2 * samples:
        first = _prompt_first(pipeline, given, names, samples)
        if first is not None:
            return Sum(factor, slice(samples) if first else slice(samples, None))
    prompted = _prompted(given, names) if samples in (None, batch) else None
    if prompted is not None:
        return Sum(factor) if prompted else None
    raise ValueError(
        f"guide: {type(pipeline).__name__} guides with scale {scale:g}, and a call of {type(model).__name__} with "
        f"{batch} samples does not tell which of them have the prompt: run it without classifier-free guidance, or "
        "guide another pipeline"
    )


def _check(pipeline: Any, names: dict[str, Any]) -> None:
    """Refuse sums that are none of those above."""
    name = type(pipeline).__name__
    if names.get("image_guidance_scale", getattr(pipeline, "image_guidance_scale", None)) is not None:
        raise ValueError(f"guide: {name} adds up three predictions: guide() knows sums of one or two")
    if names.get("use_dynamic_cfg"):
        raise ValueError(f"guide: {name} sets its scale after its predictions: leave use_dynamic_cfg out")
    if getattr(pipeline, "guider", None) is not None:
        raise ValueError(
            f"guide: the sum of {name} is its guider's: give it visattn.pipelines.guidance.guider.PerturbedGuidance"
        )


def _scale(pipeline: Any, names: dict[str, Any]) -> float | None:
    """The scale of classifier-free guidance, None where there is none.

    Raises:
        ValueError: If nothing tells.
    """
    if names.get("do_classifier_free_truncation"):
        return None
    if "do_true_cfg" in names:
        return float(names["true_cfg_scale"]) if names["do_true_cfg"] else None
    scale = names.get("current_guidance_scale", getattr(pipeline, "guidance_scale", names.get("guidance_scale")))
    scale = float(scale.flatten()[0]) if isinstance(scale, torch.Tensor) else scale
    flag = names.get("do_classifier_free_guidance", names.get("do_cfg"))
    guides = getattr(pipeline, "do_classifier_free_guidance", flag)
    if guides is None:
        # Distilled models take a scale too, but nothing negative.
        negative = [value for name, value in names.items() if _is_negative(name) and value is not None]
        guides = bool(negative) and (scale is None or scale > 1)
    if not guides:
        return None
    if scale is None:
        raise ValueError(f"guide: {type(pipeline).__name__} guides, and does not tell its guidance_scale")
    return float(scale)


def _is_one_of(pipeline: Any, names: tuple[str, ...]) -> bool:
    """Whether a pipeline is of a class with such a name, or of one that was made from it."""
    return any(kind.__name__.startswith(names) for kind in type(pipeline).__mro__)


def _prompt_first(pipeline: Any, given: Mapping[str, Any], names: dict[str, Any], samples: int) -> bool | None:
    """Whether the first half of a stacked batch has the prompt, None if nothing tells."""
    stacked = [t for value in given.values() for t in _tensors(value) if t.ndim and len(t) == 2 * samples]
    found = set()
    for name, value in names.items():
        if not (_is_negative(name) or "prompt" in name):
            continue
        for tensor in _tensors(value):
            for both in stacked:
                at = [_same(half, tensor) for half in both.chunk(2)]
                if at.count(True) == 1:
                    found.add(at[0] != _is_negative(name))
    if len(found) == 1:
        return found.pop()
    kinds = [kind for kind in type(pipeline).__mro__ if kind.__name__ not in GENERAL]
    if any(kind.__module__.split(".")[0] in READ and kind.__name__.endswith("Pipeline") for kind in kinds):
        return _is_one_of(pipeline, PROMPT_FIRST)
    return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _prompted(given: Mapping[str, Any], names: dict[str, Any]) -> bool | None:
    """Whether a call has the prompt, by what the pipeline calls the tensors it gives; None if that does not tell."""
    tensors = {id(tensor) for value in given.values() for tensor in _tensors(value)}
    found = set()
    for name, value in names.items():
        if (_is_negative(name) or "prompt" in name) and any(id(tensor) in tensors for tensor in _tensors(value)):
            found.add(not _is_negative(name))
    return found.pop() if len(found) == 1 else None


def _is_negative(name: str) -> bool:
    return name.startswith("neg") or "_neg" in name or UNCONDITIONAL in name


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """A tensor, or those in a list, tuple or mapping."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (each for each in value.values() if isinstance(each, torch.Tensor))
    elif isinstance(value, list | tuple):
        yield from (each for each in value if isinstance(each, torch.Tensor))
