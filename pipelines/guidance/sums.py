"""How the pipeline that runs adds up its predictions, from what it holds while it calls its model.

Pipelines guide by `u + s (c - u)`: c is predicted with the prompt, u without it. Some stack [u, c] in one batch, others
call the model twice, and distilled models predict c alone. A correction d of the sum is made in c: `c + d / s`.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from visattn.pipelines.patch.schedulers import owner_in

# How the names of pipelines begin whose sum is c + s (c - u), so that c counts 1 + s times.
FROM_PROMPT = ("Cosmos2", "CosmosT", "CosmosV", "Kandinsky3", "Krea2", "ZImage")
# Those that stack [c, u].
PROMPT_FIRST = ("OmniGen", "StableCascade", "Wuerstchen", "ZImage")
UNCONDITIONAL = "uncond"


class Sum(NamedTuple):
    """What a call of the model is in the pipeline's sum.

    Attributes:
        factor: How often c counts in the sum, 1 without u.
        half: Which samples of its batch are c.
    """

    factor: float
    half: slice = slice(None)


def read_sum(model: torch.nn.Module, batch: int, context: str | None) -> Sum | None:
    """What the call that is running is, None if it predicts without the prompt.

    Args:
        model: The model that is called.
        batch: Samples of the call.
        context: What the pipeline calls it (`model.cache_context`), None if it does not.

    Raises:
        ValueError: If no pipeline is calling the model, or it does not tell.
    """
    found = _running(model)
    if found is None:
        raise ValueError(
            f"guide: no pipeline is calling {type(model).__name__}, so nothing tells which of its calls have the "
            "prompt: run the pipeline that guide() was given"
        )
    pipeline, names = found
    name = type(pipeline).__name__
    if context is not None and context.startswith(UNCONDITIONAL):
        return None
    if names.get("image_guidance_scale", getattr(pipeline, "image_guidance_scale", None)) is not None:
        raise ValueError(f"guide: {name} adds up three predictions: guide() knows sums of one or two")
    scale = _scale(pipeline, names)
    if scale is None:
        return Sum(1.0)
    factor = scale + 1.0 if name.startswith(FROM_PROMPT) else scale
    if context is not None and "uncond" not in context:
        return Sum(factor)
    latents = names.get("latents")
    samples = len(latents) if isinstance(latents, torch.Tensor | list) else None
    if batch % 2 == 0 and samples is not None and batch == 2 * samples:
        return Sum(factor, slice(samples) if name.startswith(PROMPT_FIRST) else slice(samples, None))
    raise ValueError(
        f"guide: {name} guides with scale {scale:g}, and a call of {type(model).__name__} with {batch} samples does "
        "not tell which of them have the prompt: run it without classifier-free guidance, or guide another pipeline"
    )


def _scale(pipeline: Any, names: dict[str, Any]) -> float | None:
    """The scale of classifier-free guidance, None where there is none."""
    if "do_true_cfg" in names:
        return float(names["true_cfg_scale"]) if names["do_true_cfg"] else None
    if not getattr(pipeline, "do_classifier_free_guidance", names.get("do_classifier_free_guidance", False)):
        return None
    scale = names.get("current_guidance_scale", names.get("guidance_scale", getattr(pipeline, "guidance_scale", None)))
    if isinstance(scale, torch.Tensor):
        scale = scale.flatten()[0].item()
    return None if scale is None else float(scale)


def _running(model: torch.nn.Module) -> tuple[Any, dict[str, Any]] | None:
    """The pipeline that calls a model, and what it holds."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = owner_in(frame, model)
        if owner is not None:
            return owner, frame.f_locals
        frame = frame.f_back
    return None
