"""Which layers and which denoising steps get which pattern."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visattn.checks import check_precision
from visattn.files import read_text
from visattn.given import said
from visattn.patterns import Dense, MergingPattern, Pattern
from visattn.selectors import Layers, Selector, SiteName, pick, selectors_of
from visattn.staged import Staged, lists_tiles, with_precision
from visattn.steps import among_first, known_step
from visattn.tuned import Tuned

# What a layer may be given: a pattern, or one for each of its steps.
Given = Pattern | Staged
PatternLike = Pattern | str | Path | Mapping[Any, "Pattern | str | Mapping[Any, Pattern | str]"]
# The fields that count denoising steps.
_COUNTED = ("dense_steps", "dense_last_steps", "precise_steps", "precise_last_steps")
_FILES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Schedule:
    """The pattern of each layer, and how many layers and steps stay dense.

    Attributes:
        rules: Pairs of layer selectors and pattern, or patterns by step; None selects every layer.
        dense_layers: The first so many selected layers stay dense.
        dense_steps: The first so many denoising steps stay dense: a count, or a fraction between 0 and 1.
        dense_last_steps: The last so many, likewise.
        precision: What products are computed in, as in `visattn.attention`; None for the model's own dtype.
        precise_layers: Selectors of the layers that stay in the model's own dtype.
        precise_steps: The first so many denoising steps that do.
        precise_last_steps: The last so many.
        model: Class of the only models that it is for, "" for any.
        layers: How many layers these have, 0 for any number.
        label: What reports say of it, "" for nothing.
        simulates: Whether parts in 8 bits stay so where they cannot be: on a device without kernels for them, which
            would simulate them or refuse, and under gradients.
    """

    rules: tuple[tuple[tuple[Selector, ...] | None, Given], ...]
    dense_layers: int = 0
    dense_steps: int | float = 0
    dense_last_steps: int | float = 0
    precision: str | None = None
    precise_layers: tuple[Selector, ...] = ()
    precise_steps: int | float = 0
    precise_last_steps: int | float = 0
    model: str = ""
    layers: int = 0
    label: str = ""
    simulates: bool = True

    @classmethod
    def of(
        cls,
        pattern: PatternLike | Schedule,
        layers: Layers = None,
        dense_layers: int = 0,
        dense_steps: int | float = 0,
        dense_last_steps: int | float = 0,
        precision: str | None = None,
        precise_layers: Layers = None,
        precise_steps: int | float = 0,
        precise_last_steps: int | float = 0,
    ) -> Schedule:
        """The schedule that the arguments of `apply` describe.

        Args:
            pattern: A pattern, its text, a mapping from layers to patterns or to mappings from steps to patterns, the
                path of a JSON or YAML file with such a mapping or of one that `visattn tune` wrote, or a schedule.
            layers: Indices, slices, ranges like "0-3" or "4-", or names (globs) of layers.
            dense_layers: Count of selected layers.
            dense_steps: Count or fraction of steps.
            dense_last_steps: Likewise.
            precision: See the attributes.
            precise_layers: As `layers`; None for none.
            precise_steps: Count or fraction of steps.
            precise_last_steps: Likewise.

        Raises:
            ValueError: If a value is out of range, both `layers` and a mapping are given, or a pattern lists no key
                tiles where a precision is given.
        """
        file = ""
        if isinstance(pattern, Path) or (isinstance(pattern, str) and pattern.lower().endswith(_FILES)):
            file = f"{Path(pattern)}: "
            pattern = _read(Path(pattern))
        if isinstance(pattern, Schedule):
            rules = list(pattern.rules)
            own = {"model": pattern.model, "layers": pattern.layers, "label": pattern.label}
            own["simulates"] = pattern.simulates
            if layers is not None or dense_layers:
                raise ValueError(
                    f"layers={layers!r}, dense_layers={dense_layers}: the schedule itself says which layers"
                )
            dense_steps, dense_last_steps = (
                dense_steps or pattern.dense_steps,
                dense_last_steps or pattern.dense_last_steps,
            )
            dense_layers = pattern.dense_layers
            precision = precision or pattern.precision
            precise_layers = (pattern.precise_layers or None) if precise_layers is None else precise_layers
            precise_steps = precise_steps or pattern.precise_steps
            precise_last_steps = precise_last_steps or pattern.precise_last_steps
        elif isinstance(pattern, Mapping):
            own = {}
            if layers is not None:
                raise ValueError(f"layers={layers!r} and a pattern per layer both choose layers: pass one of them")
            if not pattern:
                raise ValueError("pattern={} names no layer: pass e.g. {'0-3': 'dense', '4-': 'na(window=7x7)'}")
            rules = [_rule(key, value, file) for key, value in pattern.items()]
        else:
            own = {}
            rules = [(None if layers is None else selectors_of(layers), _given(pattern))]
        if isinstance(dense_layers, bool) or not isinstance(dense_layers, int) or dense_layers < 0:
            raise ValueError(f"dense_layers={said(dense_layers)} must be a count of layers, 0 or more")
        precise = () if precise_layers is None else selectors_of(precise_layers, "precise_layers")
        numbers = dense_layers, dense_steps, dense_last_steps
        made = cls(tuple(rules), *numbers, precision, precise, precise_steps, precise_last_steps, **own)
        for name in _COUNTED:
            value = getattr(made, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and not (isinstance(value, float) and 0 <= value < 1):
                raise ValueError(f"{name}={said(value)} must be a count of steps like 12 or a fraction like 0.25")
        made._check_precision()
        return made

    def _check_precision(self) -> None:
        check_precision(self.precision, ())
        if self.precision is None and (self.precise_layers or self.precise_steps or self.precise_last_steps):
            what = "precise_layers, precise_steps and precise_last_steps"
            raise ValueError(f"{what} are what a precision leaves out: pass precision= too")
        own = next((each.precision for each in self.staged if each.precision), None)
        if self.precision is not None and own is not None:
            raise ValueError(
                f"precision={self.precision!r} and a schedule whose own patterns are in {own}: leave one of them out"
            )
        unlisted = [pattern for pattern in self.patterns if not lists_tiles(pattern)]
        if self.precision is not None and unlisted:
            raise ValueError(
                f"precision={self.precision!r} is for patterns that list key tiles, which {unlisted[0]} does not: "
                "leave it out, or choose another pattern"
            )

    @classmethod
    def tuned(cls, tuned: Tuned) -> Schedule:
        """The schedule of a file of `visattn tune`."""
        return cls(tuned.rules, model=tuned.model, layers=tuned.count)

    @functools.cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns of the rules."""
        found = (given.patterns if isinstance(given, Staged) else (given,) for _, given in self.rules)
        return tuple(pattern for some in found for pattern in some)

    @functools.cached_property
    def staged(self) -> tuple[Staged, ...]:
        """What has a pattern for each step, or scales with the grid."""
        return tuple(given for _, given in self.rules if isinstance(given, Staged))

    @property
    def counted(self) -> str:
        """The first argument that counts denoising steps, empty if none does."""
        return next((name for name in _COUNTED if getattr(self, name)), "")

    @property
    def any_precision(self) -> str | None:
        """What anything is computed in but the model's own dtype, None if nothing is."""
        return self.precision or next((each.precision for each in self.staged if each.precision), None)

    @functools.cached_property
    def needs_steps(self) -> bool:
        """Whether anything depends on the denoising step."""
        stepped = any(p.remembers or (isinstance(p, MergingPattern) and p.stepped) for p in self.patterns)
        stepped = stepped or not all(each.constant for each in self.staged)
        return bool(self.counted) or stepped

    @functools.cached_property
    def keeps(self) -> Pattern | None:
        """The first pattern that keeps something from step to step, None if none does."""
        return next((pattern for pattern in self.patterns if pattern.needs_steps), None)

    def keeps_on(self, total: int | None, grid: tuple[int, ...]) -> Pattern | None:
        """The first pattern of runs of so many steps on a grid that keeps something from step to step."""
        given = (each.on(total, grid).stages if isinstance(each, Staged) else each for _, each in self.rules)
        found = ([each] if isinstance(each, Pattern) else [stage.pattern for stage in each] for each in given)
        return next((pattern for some in found for pattern in some if pattern.needs_steps), None)

    def assign(self, sites: Sequence[SiteName], model: str) -> list[Given | None]:
        """What each site is given, None where no rule selects it.

        Args:
            sites: The attention modules in the order of the layers.
            model: What errors call the model.

        Raises:
            ValueError: If a rule selects nothing or two rules select the same layer, or it is for other models.
        """
        layers = list(dict.fromkeys(site.layer for site in sites))
        if model != (self.model or model) or len(layers) != (self.layers or len(layers)):
            raise ValueError(
                f"this schedule was tuned for {self.model} with {self.layers} layers, and {model} has {len(layers)}: "
                "run `visattn tune` for it, or give a pattern"
            )
        found: list[Given | None] = [None] * len(sites)
        for selectors, pattern in self.rules:
            picked = set(range(len(sites))) if selectors is None else pick(selectors, sites, layers, model)
            for i in sorted(picked):
                if found[i] is not None:
                    raise ValueError(f"layer {sites[i].layer!r} is given twice: {found[i]} and {pattern}; name it once")
                found[i] = pattern
        selected = list(dict.fromkeys(s.layer for s, p in zip(sites, found, strict=True) if p is not None))
        if self.dense_layers and self.dense_layers >= len(selected):
            raise ValueError(
                f"dense_layers={self.dense_layers} leaves nothing of the {len(selected)} selected layers of {model}: "
                "pass fewer"
            )
        dense = set(selected[: self.dense_layers])
        pairs = zip(sites, found, strict=True)
        return [Dense() if p is not None and s.layer in dense else p for s, p in pairs]

    def precisions(self, sites: Sequence[SiteName], model: str) -> list[str | None]:
        """What each site computes in; the arguments are those of `assign`."""
        layers = list(dict.fromkeys(site.layer for site in sites))
        own = pick(self.precise_layers, sites, layers, model) if self.precise_layers else set()
        given = self.assign(sites, model)
        # What differs from step to step is known in its forward.
        fixed = [each.precision if isinstance(each, Staged) and each.constant else None for each in given]
        return [None if i in own else each or self.precision for i, each in enumerate(fixed)]

    def assign_stepless(
        self, sites: Sequence[SiteName], model: str, grid: tuple[int, ...] | None = None
    ) -> list[Pattern | None]:
        """`assign` for a model without denoising steps.

        Args:
            sites: As there.
            model: Likewise.
            grid: Tokens per axis of its images, for schedules that were tuned on a grid; None if unknown.

        Raises:
            ValueError: As there, or if anything has patterns by steps.
        """
        for each in self.staged:
            if not each.constant:
                raise ValueError(f"{each} goes by denoising steps, and {model} has none: give each layer a pattern")
            if each.grid is not None and grid is None:
                raise ValueError(
                    f"{each} was tuned on a grid, and nothing tells that of {model}: give each layer a pattern"
                )
        found = self.assign(sites, model)
        return [given.pattern(0, grid or ()) if isinstance(given, Staged) else given for given in found]

    def stage(self, step: int | None, total: int | None, grid: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Which of its choices each of `staged` has on a grid, and in which of its stages that is.

        Raises:
            ValueError: If that depends on a step or a number of steps that is unknown.
        """
        found = []
        for each in self.staged:
            number = each.choice(total, grid)
            choice = each.choices[number]
            if not choice.whole:
                known_step(f"a pattern for steps {choice.stages[0].steps}", step, total, choice.stages[0].shares)
            found.append((number, choice.index(step, total)))
        return tuple(found)

    def beyond(self, total: int) -> list[str]:
        """What counts steps that a run of so many does not have, as text."""
        found = []
        staged = (choice for each in self.staged if not each.constant for choice in each.choices)
        for stage in (stage for each in staged for stage in each.stages):
            last = stage.first if stage.end is None else stage.end - 1
            if not stage.shares and last >= total:
                found.append(f"steps {stage.steps}")
        for name in _COUNTED:
            value = getattr(self, name)
            if isinstance(value, int) and value > total:
                found.append(f"{name}={value}")
        return list(dict.fromkeys(found))

    def is_dense(self, step: int | None, total: int | None) -> bool:
        """Whether a denoising step (from 0) of so many stays dense.

        Raises:
            ValueError: If that depends on a step or a number of steps that is unknown.
        """
        return self._at_an_end("dense", step, total)

    def is_precise(self, step: int | None, total: int | None) -> bool:
        """Whether a denoising step stays in the model's own dtype; see `is_dense`."""
        return self._at_an_end("precise", step, total)

    def _at_an_end(self, kind: str, step: int | None, total: int | None) -> bool:
        first, last = getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_last_steps")
        if first and among_first(first, f"{kind}_steps={first}", step, total):
            return True
        if not last:
            return False
        at, number = known_step(f"{kind}_last_steps={last}", step, total, True)
        return at >= number - (last if isinstance(last, int) else round(last * number))


def _given(value: Any) -> Given:
    if isinstance(value, Mapping):
        return Staged.of(value)
    pattern, precision = with_precision(value)
    return pattern if precision is None else Staged.of(value)


def _parsed(path: Path) -> Any:
    """What a JSON or YAML file holds."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError(f"reading {path.name} needs PyYAML: pip install pyyaml, or write it as JSON") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def _rule(layers: Any, value: Any, file: str) -> tuple[Any, Given]:
    """One line of a mapping from layers to patterns; its errors say which of which file."""
    try:
        return selectors_of(layers), _given(value)
    except ValueError as error:
        raise ValueError(f"{file}layers {layers!r}: {error}") from None


def _read(path: Path) -> Mapping[Any, str] | Schedule:
    if not path.is_file():
        raise ValueError(f"pattern file {str(path)!r} does not exist: `visattn tune` writes such files")
    found = _parsed(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path.name} must map layers to patterns, like {{'0-3': 'dense', '4-': 'na(window=7x7)'}}")
    if "visattn_schedule" in found:
        return Schedule.tuned(Tuned.of(found, str(path)))
    return found
