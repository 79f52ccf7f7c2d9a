"""Patches a model of ComfyUI: a clone with an attention function of its own, which leaves the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from visattn.clients.comfy.override import ComfyRun, Override, Span
from visattn.clients.comfy.records import RECORDS, record_of
from visattn.dispatch import load
from visattn.patterns import MergingPattern
from visattn.request import Request
from visattn.schedule import PatternLike, Schedule
from visattn.selectors import Selector

# What ComfyUI calls the things that a patch uses.
PREPARE, CLEANUP = "on_prepare_state", "on_cleanup"
OVERRIDE = "optimized_attention_override"
# Under this name the patch is among the model's options.
KEY = "visattn"


def patch(
    patcher: Any,
    pattern: PatternLike,
    *,
    layers: Selector | None = None,
    dense_steps: int | float = 0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    min_tokens: int = 0,
    backend: str = "auto",
    strict: bool = False,
) -> Any:
    """A clone of a model whose self-attention runs a pattern; leaving it out of the graph is the undo.

    Args:
        patcher: A ModelPatcher of ComfyUI.
        pattern: As of `visattn.apply`: a pattern, its text, a mapping from layers to patterns, or a file of one.
        layers: Layers to patch, like "4-9", in the order of their calls; None for all.
        dense_steps: The first so many steps stay dense: a count, or a fraction.
        start_percent: Before this part of the sampling all is dense.
        end_percent: After this part all is dense.
        min_tokens: Grids of fewer tokens stay dense.
        backend: "auto" or the name of a backend.
        strict: Raise if a forward misses a selected layer.

    Returns:
        The clone; `run_of` it has the report.

    Raises:
        ValueError: If the model's class is unknown, or the pattern does not fit it.
    """
    if backend != "auto":
        load(backend)
    model = patcher.get_model_object("diffusion_model")
    record = record_of(model)
    if record is None:
        known = ", ".join(found.models for found in RECORDS)
        raise ValueError(f"visattn does not know where the tokens of a {type(model).__name__} sit: it knows {known}")
    schedule = Schedule.of(pattern, layers, 0, dense_steps)
    for each in schedule.patterns:
        if each.learnable or isinstance(each, MergingPattern):
            raise ValueError(
                f"{each} has parameters or merges tokens, which no node does: use a pattern like na(window=...)"
            )
    span = Span()
    if start_percent > 0 or end_percent < 1:
        percent_to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
        span = Span(float(percent_to_sigma(start_percent)), float(percent_to_sigma(end_percent)))
    run = ComfyRun(record, Request(schedule, backend, (), strict, strict), span, min_tokens)
    return _clone(patcher, run)


def _clone(patcher: Any, run: ComfyRun) -> Any:
    made = patcher.clone()
    options = made.model_options.setdefault("transformer_options", {})
    override = Override(run, options.get(OVERRIDE))
    options[OVERRIDE], options[KEY] = override, run
    made.add_wrapper_with_key(run.record.around, KEY, _wrapper(run))
    made.add_callback_with_key(PREPARE, KEY, _on_top(override))
    made.add_callback_with_key(CLEANUP, KEY, lambda *args: run.finish())
    return made


def run_of(patcher: Any) -> ComfyRun | None:
    """The run of the last patch of a model, None if it has none."""
    return patcher.model_options.get("transformer_options", {}).get(KEY)


def _wrapper(run: ComfyRun) -> Callable[..., Any]:
    """Around a forward of the model."""

    def visattn_forward(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        given = _named(executor.original, (x, *args), kwargs)
        run.forward_begins(getattr(executor.class_obj, "diffusion_model", executor.class_obj), x, given)
        try:
            out = executor(x, *args, **kwargs)
        except BaseException:
            run.leave()
            raise
        run.forward_ends()
        return out

    return visattn_forward


def _named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, those that it takes under any name with them."""
    given = signature(forward).bind(*args, **kwargs)
    more = [each.name for each in given.signature.parameters.values() if each.kind is each.VAR_KEYWORD]
    found = {name: value for name, value in given.arguments.items() if name not in more}
    return found | {name: value for each in more for name, value in given.arguments.get(each, {}).items()}


def _on_top(override: Override) -> Callable[..., None]:
    """Before the sampling: an override that a later node has set becomes the one to fall back to."""

    def prepare(*args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            options = given.get("transformer_options") if isinstance(given, dict) else None
            if options is None or options.get(KEY) is not override.run:
                continue
            found = options.get(OVERRIDE)
            if found is not override:
                override.previous, options[OVERRIDE] = found, override

    return prepare
