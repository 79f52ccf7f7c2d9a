"""`apply()`: patch the attention of a model or pipeline, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.dispatch import load
from visattn.files import as_path
from visattn.given import said, switch
from visattn.layout import Layout, check_layout
from visattn.parameters import read_weights
from visattn.patched import Handle
from visattn.patterns import MergingPattern
from visattn.presets import automatic, is_auto
from visattn.request import ADAPTERS, Patch, Request, package_of
from visattn.schedule import PatternLike, Schedule
from visattn.selectors import Layers
from visattn.trained import is_student, load_own, load_trained, student_model, write_trained

__all__ = ["ADAPTERS", "Handle", "Patch", "Request", "apply"]


def apply(
    target: Any,
    pattern: PatternLike | Schedule,
    *,
    layers: Layers = None,
    dense_layers: int = 0,
    dense_steps: int | float = 0,
    dense_last_steps: int | float = 0,
    backend: str = "auto",
    layout: Layout | Sequence[Layout] | None = None,
    strict: bool = False,
    weights: str | Path | None = None,
    always: bool = False,
    caught: int = 0,
    precision: str | None = None,
    precise_layers: Layers = None,
    precise_steps: int | float = 0,
    precise_last_steps: int | float = 0,
    parallel: str | None = None,
    mesh: Any = None,
    untrained: bool = False,
) -> Handle:
    """Make the self-attention of a model sparse, until the handle removes it.

    Args:
        target: A diffusers pipeline or model, a timm model, or a transformers model or pipeline with a vision tower.
        pattern: A pattern or its text like "na(window=7x7)"; a mapping from layers to patterns like
            {"0-3": "dense", "4-": "na(window=7x7)"}, where a layer may have a mapping from denoising steps to patterns
            like {"0-0.25": "dense", "0.25-": "na(window=7x7)"} (shares of the run, or counts: {"0-3": ..., "4-": ...};
            steps that none names stay dense); the path of a JSON or YAML file with such a mapping, or of one that
            `visattn tune` wrote; or a `Schedule`. "auto" is the fastest preset of this model that was verified to have
            30 dB to dense attention, "auto(psnr=25)" one with less, on the grid and with the number of steps of a run;
            runs that none was verified for have a careful schedule, and the report says which. The path of a
            `student.safetensors` that a distillation wrote gives the model its weights too, until the handle removes
            them, with the pattern, layers and precision that it was trained for.
        layers: Layers to patch: indices, slices, ranges like "4-9", or names; None for all.
        dense_layers: The first so many selected layers stay dense.
        dense_steps: The first so many denoising steps stay dense: a count, or a fraction like 0.25.
        dense_last_steps: The last so many stay dense, likewise.
        backend: "auto" for the cheapest that can run a call, or a name of `backends()`.
        layout: Where the tokens sit, for a model of a class that visattn does not know. Several, for a diffusers model
            whose layers attend to sequences of different lengths (the levels of a UNet): each call has the first one
            that is as long as its sequence.
        strict: Raise if a forward misses a selected attention module.
        weights: File that `Handle.save` wrote: learnable parameters of the same patterns at the same layers. None
            starts from their initial values.
        always: Run the pattern wherever it can run. Without it "auto" leaves a module of a model its own dense
            attention where a call is estimated to take longer with the pattern (few tokens), or on a GPU not to save
            the device twice what a call in a model costs the host, and computes in the model's own dtype where
            `precision` is estimated to take longer; the report counts such calls with both estimates. Calls with
            gradients, learnable patterns,
            named backends, `strict` and `weights` always run the pattern; a model that was trained with a pattern
            should be given it with `always`.
        caught: So many queries of the grid of every call are compared with dense attention: the report says which share
            of their exact attention falls on what the pattern lists. It costs about as many queries of dense attention,
            and compiled code is not looked at. 0 for none.
        precision: What calls that run a pattern compute in: None for the model's own dtype, "int8" or "fp8" as in
            `attention`. Such a model is for inference; on a CPU it is slower, as errors are simulated there, and on a
            GPU only calls are rounded that it makes faster (see `always`).
        precise_layers: Layers that stay in the model's own dtype all the same, selected as by `layers`.
        precise_steps: The first so many denoising steps stay in it: a count, or a fraction like 0.25.
        precise_last_steps: The last so many do.
        parallel: How the processes of torch.distributed share the tokens of a diffusers model; each makes this call.
            "halo" gives each a slab of the grid and fetches the border keys that patterns list, "ulysses" exchanges
            tokens for heads; both keep dense layers and steps exact. See docs/parallel.md. None for one process, or for
            diffusers' own `enable_parallelism`.
        mesh: Which processes: a DeviceMesh of one axis or a process group; None for those of the model's
            ContextParallelConfig, or all.
        untrained: Let patterns that mean nothing before they are trained, `gate`, start from their initial parameters.

    Returns:
        The handle that reports and undoes; also a context manager.

    Raises:
        ValueError: If the target is unknown or already patched, the pattern does not fit it, nothing is
            selected, or the weights are missing or of other layers, patterns or shapes.
    """
    for name, value in (("strict", strict), ("always", always), ("untrained", untrained)):
        switch(value, name)
    if not isinstance(backend, str) or backend != "auto":
        load(backend)
    if is_student(pattern):
        fixed = {"layers": layers, "dense_layers": dense_layers, "weights": weights}
        how = {"dense_steps": dense_steps, "dense_last_steps": dense_last_steps, "backend": backend, "layout": layout}
        how |= {"strict": strict, "caught": caught, "precision": precision, "precise_layers": precise_layers}
        how |= {"precise_steps": precise_steps, "precise_last_steps": precise_last_steps}
        return _apply_student(target, Path(str(pattern)), fixed, how | {"parallel": parallel, "mesh": mesh})
    package = package_of(target)
    if isinstance(pattern, str) and is_auto(pattern):
        # What processes share is in the model's own dtype.
        pattern = automatic(target, pattern, parallel is None, precision)
    precise = precision, precise_layers, precise_steps, precise_last_steps
    schedule = Schedule.of(pattern, layers, dense_layers, dense_steps, dense_last_steps, *precise)
    for each in schedule.patterns:
        if isinstance(each, MergingPattern) and package != "diffusers":
            raise ValueError(f"{each} merges tokens of a UNet of diffusers: use agent(agents=...) on a {package} model")
    for each in schedule.patterns:
        if each.needs_weights and weights is None and not untrained:
            raise ValueError(
                f"{each} chooses by trained weights: pass weights= with a file that holds them, or untrained=True to "
                "train them"
            )
    if weights is not None:
        # Before anything is patched.
        read_weights(as_path(weights))
    if isinstance(caught, bool) or not isinstance(caught, int) or caught < 0:
        raise ValueError(f"caught={said(caught)} must be how many queries of a call are looked at, 0 for none")
    if parallel is None and mesh is not None:
        raise ValueError(f"mesh={said(mesh)} says which processes share the tokens: pass parallel='halo' or 'ulysses'")
    if parallel is not None:
        _check_parallel(parallel, package, caught, schedule.any_precision)
    always = always or strict or weights is not None or parallel is not None
    request = Request(schedule, backend, _layouts(layout), strict, always, caught, parallel, mesh)
    handle = Handle(ADAPTERS[package](target, request), request)
    if weights is not None:
        try:
            handle.parameters.load(weights)
        except ValueError:
            handle.remove()
            raise
    return handle


def _apply_student(target: Any, path: Path, fixed: dict[str, Any], how: dict[str, Any]) -> Handle:
    """`apply` of the pattern that a student was trained for, on the model with its weights."""
    trained = load_trained(path)
    given = [name for name, value in fixed.items() if value]
    if given:
        raise ValueError(f"{given[0]}={fixed[given[0]]!r}: {path} itself says which pattern, layers and weights")
    about = trained.about
    layers = {"layers": about.get("layers"), "dense_layers": about.get("dense_layers", 0)}
    precision = how["precision"] or about.get("precision") or None
    if precision is None:
        how = {name: value for name, value in how.items() if not name.startswith("preci")}
    else:
        how = how | {"precision": precision}
    undo = write_trained(student_model(target, trained), trained)
    handle = None
    try:
        # A model that was trained with a pattern needs it everywhere.
        handle = apply(target, about["pattern"], **layers, **how, always=True, untrained=True)
        load_own(handle, trained)
    except BaseException:
        if handle is not None:
            handle.remove()
        undo()
        raise
    handle._undo = undo
    return handle


def _check_parallel(parallel: Any, package: str, caught: int, precision: str | None) -> None:
    if not isinstance(parallel, str) or parallel not in ("ulysses", "halo"):
        raise ValueError(f"parallel={said(parallel)} must be 'ulysses', 'halo' or None")
    if package != "diffusers":
        raise ValueError(
            f"parallel={parallel!r} shares the tokens of diffusers models, and the target is of {package}: leave it out"
        )
    if caught:
        raise ValueError(
            f"parallel={parallel!r} and caught={caught}: no process has all queries and keys, leave one out"
        )
    if precision is not None:
        raise ValueError(
            f"parallel={parallel!r} and precision={precision!r}: attention that processes share is computed in the "
            "model's own dtype, leave one out"
        )


def check_handle(handle: Any) -> None:
    """Raise a ValueError for what is no handle of a pipeline that is patched already, nor None."""
    if handle is not None and not isinstance(handle, Handle):
        raise ValueError(f"handle={said(handle)} must be what apply() returned for this pipeline, or None")


def _layouts(given: Layout | Sequence[Layout] | None) -> tuple[Layout, ...]:
    """What `layout` of `apply` says, as several.

    Raises:
        ValueError: If these are no layouts of self-attention with equally many axes, or two of equal length.
    """
    if given is None:
        return ()
    every: Any = given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else (given,)
    layouts: tuple[Layout, ...] = tuple(every)
    if not layouts:
        raise ValueError(
            "layout is empty: pass Layout(grid, prefix=..., suffix=...), one for each length of a sequence"
        )
    for layout in layouts:
        check_layout(layout)
        if layout.key_layout is not None:
            raise ValueError(f"layout={layout} has a key_layout: pass where the tokens of its self-attention sit")
    if len({layout.dims for layout in layouts}) > 1 or len({layout.length for layout in layouts}) < len(layouts):
        raise ValueError(
            f"layout has {' and '.join(map(str, layouts))}: pass layouts with equally many axes, one for each length"
        )
    return layouts
