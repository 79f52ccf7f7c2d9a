"""Time the backends on a pattern, with dense SDPA in the same turns."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from visattn.attend import Explanation, attention, explain
from visattn.dispatch import BACKENDS, load, verdict
from visattn.layout import Layout
from visattn.patterns import PATTERNS, Dense, ListedPattern, Neighborhood, parse
from visattn.plans import plan
from visattn.problem import Problem, Support
from visattn.timing import Timing, interleave, time_once

DENSE = "dense"
# Beginning of the reason why a backend that should run a case does not.
FAILED = "failed"
SUPPORTED = Support(True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem to time.

    Attributes:
        pattern: A pattern's text.
        layout: The tokens; keys are elsewhere where its key layout says so.
        batch: Batch size.
        heads: Heads.
        dim: Channels per head.
        dtype: Name of a dtype.
        device: Like "cpu" or "cuda".
        backward: Whether the gradients of q, k and v are computed too.
    """

    pattern: str
    layout: Layout
    batch: int = 1
    heads: int = 4
    dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.pattern} on {self.layout}"

    @property
    def is_causal(self) -> bool:
        """Whether torch's causal mask is the one that its pattern is a part of: on a line, and alone there."""
        pattern, layout = parse(self.pattern), self.layout
        alone = layout.dims == 1 and layout.key_layout is None and layout.length == layout.tokens
        return alone and isinstance(pattern, Neighborhood) and pattern.causal is True


# Patterns and grids by name; the other options of a case come from the command line.
SUITES: MappingProxyType[str, tuple[tuple[str, tuple[int, ...]], ...]] = MappingProxyType(
    {
        "small": (("na(window=7x7)", (32, 32)), ("na(window=9x9)", (32, 32)), ("na(window=5x5x5)", (8, 16, 16))),
        "image": (
            ("na(window=15x15)", (64, 64)),
            ("na(window=16x16, stride=8x8)", (64, 64)),
            ("clear(radius=16)", (64, 64)),
            ("routing(regions=8x8, topk=4)", (64, 64)),
        ),
        "video": (("na(window=6x12x12)", (12, 32, 32)), ("radial(decay=0.5)", (12, 32, 32))),
        "growth": tuple(("na(window=15x15)", (side, side)) for side in (32, 45, 64, 91, 128)),
    }
)


@dataclass(frozen=True)
class Line:
    """The result of one backend on one case.

    Attributes:
        backend: Its name, or "dense" for plain SDPA without the pattern.
        timing: Seconds per call, None if it cannot run the case.
        reason: Why it cannot run, or why it was measured only once.
        speedup: Median time of dense SDPA divided by its own.
        chosen: Whether "auto" takes it.
        error: Largest absolute difference of its output from that of the first backend that runs the case; None
            for that one and for "dense".
        other: Whether it cannot because it is made for patterns of another kind.
    """

    backend: str
    timing: Timing | None
    reason: str = ""
    speedup: float | None = None
    chosen: bool = False
    error: float | None = None
    other: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        timing = None if self.timing is None else self.timing.to_dict()
        return {**dataclasses.asdict(self), "timing": timing}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Line:
        """From what `to_dict` gave."""
        timing = None if found["timing"] is None else Timing(tuple(found["timing"]["seconds"]))
        return cls(**{**found, "timing": timing})


@dataclass(frozen=True)
class Result:
    """What was measured on one case.

    Attributes:
        case: The problem.
        lines: One per backend, dense SDPA first.
        density: Visible share of all pairs, None for a pattern that is no list of pairs.
        flop_bound: Bound on the gain over dense attention by visible pairs, None for dense attention itself.
        tile_bound: The same by visited tiles.
    """

    case: Case
    lines: tuple[Line, ...] = field(default=())
    density: float | None = None
    flop_bound: float | None = None
    tile_bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        case = dataclasses.asdict(self.case)
        case["layout"]["tokens"] = self.case.layout.length
        bounds = {name: getattr(self, name) for name in ("density", "flop_bound", "tile_bound")}
        return {"case": case, **bounds, "lines": [line.to_dict() for line in self.lines]}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Result:
        """From what `to_dict` gave."""
        bounds = {name: found[name] for name in ("density", "flop_bound", "tile_bound")}
        case = Case(**{**found["case"], "layout": _layout(found["case"]["layout"])})
        return cls(case, tuple(Line.of(line) for line in found["lines"]), **bounds)


def _layout(found: dict[str, Any]) -> Layout:
    """Of its fields as JSON."""
    keys = found["key_layout"]
    return Layout(found["grid"], found["prefix"], found["suffix"], None if keys is None else _layout(keys))


def backend_names(text: str) -> tuple[str, ...]:
    """`all` (every one but the slow reference) or names with commas.

    Raises:
        ValueError: If a name is unknown.
    """
    if text == "all":
        return tuple(name for name in BACKENDS.usable() if name != "reference")
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        load(name)
    return names


def check_case(case: Case) -> None:
    """Raise a ValueError if a case cannot be, before any is timed."""
    parse(case.pattern).check(*case.layout.grids)
    if min(case.batch, case.heads, case.dim) < 1:
        raise ValueError(f"batch {case.batch}, heads {case.heads} and head dim {case.dim} must be at least 1")
    if case.dtype not in DTYPES:
        raise ValueError(f"dtype {case.dtype!r} does not exist here: pass one of {', '.join(DTYPES)}")


def run_case(case: Case, backends: Sequence[str], *, repeats: int = 5, patience: float = 10.0) -> Result:
    """Time dense SDPA and backends on one case, in turns.

    Every backend runs at least once before it is timed (plans, compilation, first touch of memory). One whose
    second call takes longer than `patience` is not repeated.

    Args:
        case: The problem.
        backends: Names of backends.
        repeats: Measurements of each.
        patience: Seconds.

    Raises:
        ValueError: If the case cannot be.
    """
    check_case(case)
    q, k, v, grad = _tensors(case)
    problem = explain(case.pattern, case.layout, q)
    runs, refused = _contenders(case, backends, (q, k, v, grad), problem)
    _try(runs, refused)
    errors = _errors(case, [name for name in runs if name != DENSE], q, k, v)
    timings, notes = _time(runs, repeats, patience, case.device)
    dense = timings[DENSE].median
    lines = []
    for name in (DENSE, *backends):
        timing, support = timings.get(name), refused.get(name, SUPPORTED)
        speedup = None if timing is None else dense / timing.median
        why, chosen = support.reason or notes.get(name, ""), name == problem.choice
        lines.append(Line(name, timing, why, speedup, chosen, errors.get(name), support.other))
    return Result(case, tuple(lines), *_bounds(problem.problem))


def contenders(
    case: Case, backends: Sequence[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, Support], Explanation]:
    """What runs a case once: plain dense SDPA and each backend; how others refuse; and what "auto" makes of it."""
    tensors = _tensors(case)
    found = explain(case.pattern, case.layout, tensors[0])
    return *_contenders(case, backends, tensors, found), found


def _contenders(
    case: Case,
    backends: Sequence[str],
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    asked: Explanation,
) -> tuple[dict[str, Callable[[], object]], dict[str, Support]]:
    """What runs a case once, by backend, and how others refuse."""
    runs: dict[str, Callable[[], object]] = {DENSE: _dense_run(*tensors, causal=case.is_causal)}
    # Some answer only after they have tried: nobody is asked twice.
    known = {each.backend.name: each.support for each in asked.candidates}
    refused: dict[str, Support] = {}
    for name in backends:
        able = known.get(name) or verdict(load(name), asked.problem)
        if able.ok:
            runs[name] = _run(case, name, *tensors)
        else:
            refused[name] = able
    return runs, refused


def _try(runs: dict[str, Callable[[], object]], refused: dict[str, Support]) -> None:
    """Run each backend once; one that fails, for lack of memory most often, is left out with its reason."""
    for name in [name for name in runs if name != DENSE]:
        try:
            runs[name]()
        except (RuntimeError, MemoryError) as error:
            del runs[name]
            refused[name] = Support(False, f"{FAILED}: {str(error).strip().splitlines()[0]}")


def _tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator(case.device).manual_seed(0)

    def drawn(tokens: int) -> torch.Tensor:
        # On the device: a CPU would need minutes for the longest sequences.
        shape = (case.batch, tokens, case.heads, case.dim)
        return torch.randn(shape, generator=generator, device=case.device).to(DTYPES[case.dtype])

    own, keys = case.layout.length, case.layout.keys.length
    q, k, v = drawn(own), drawn(keys), drawn(keys)
    if not case.backward:
        return q, k, v, None
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), drawn(own)


def _run(
    case: Case, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor | None
) -> Callable[[], object]:
    def call() -> torch.Tensor:
        return attention(q, k, v, case.pattern, case.layout, backend=name)

    return _with_gradients(call, (q, k, v), grad)


def _dense_run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor | None, causal: bool = False
) -> Callable[[], object]:
    """Plain SDPA in the memory order that it likes best: heads before tokens."""
    q, k, v = (t.detach().transpose(1, 2).contiguous().requires_grad_(grad is not None) for t in (q, k, v))

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return _with_gradients(call, (q, k, v), None if grad is None else grad.transpose(1, 2).contiguous())


def _with_gradients(
    call: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], grad: torch.Tensor | None
) -> Callable[[], object]:
    return call if grad is None else lambda: torch.autograd.grad(call(), leaves, grad)


def _errors(case: Case, names: Sequence[str], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """Largest difference of each backend's output from the first one's."""
    with torch.no_grad():
        outputs = {n: attention(q, k, v, case.pattern, case.layout, backend=n).float() for n in names}
    return {name: (outputs[name] - outputs[names[0]]).abs().max().item() for name in names[1:]}


def _time(
    runs: dict[str, Callable[[], object]], repeats: int, patience: float, device: str
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Seconds of each run, and a note for those that are measured only once."""
    timings: dict[str, Timing] = {}
    notes: dict[str, str] = {}
    for name, run in runs.items():
        run()
        seconds = time_once(run)
        if seconds > patience:
            timings[name], notes[name] = Timing((seconds,)), f"over {patience:g} s, so measured once"
    quick = {name: run for name, run in runs.items() if name not in timings}
    at_least = 0.01 if torch.device(device).type == "cuda" else 0.0
    return timings | interleave(quick, repeats=repeats, warmup=0, at_least=at_least), notes


def _bounds(problem: Problem) -> tuple[float | None, float | None, float | None]:
    if not isinstance(problem.pattern, ListedPattern):
        return None, None, None
    if isinstance(problem.pattern, Dense):
        # Its plan lists all pairs of tiles: half a minute on 262,144 tokens.
        return 1.0, None, None
    made = plan(problem.pattern, problem.layout)
    return made.density, made.flop_bound, made.tile_bound


def _check_text(text: str) -> None:
    """Raise a ValueError for what is no pattern; it may be meant as a suite."""
    try:
        parse(text)
    except ValueError as error:
        near = difflib.get_close_matches(text, [*SUITES, *(kind.name for kind in PATTERNS)], 1, 0.75)
        meant = bool(near) and near[0] in SUITES
        raise ValueError(f"no suite is named {text!r}: did you mean {near[0]}?" if meant else str(error)) from None


def cases(patterns: Sequence[str], grids: Sequence[tuple[int, ...]], prefix: int, suffix: int) -> Iterator[Case]:
    """Patterns on grids; a suite stands for its own patterns and grids.

    Raises:
        ValueError: If a suite is given a grid, or a pattern none.
    """
    for text in patterns:
        if text in SUITES:
            if grids:
                raise ValueError(f"suite {text!r} has its own grids: leave --grid away")
            pairs = SUITES[text]
        else:
            _check_text(text)
            if not grids:
                raise ValueError(f"{text} needs --grid, like --grid 64x64; suites have their own: {', '.join(SUITES)}")
            pairs = tuple((text, grid) for grid in grids)
        for pattern, grid in pairs:
            yield Case(pattern=pattern, layout=Layout(grid, prefix, suffix))
