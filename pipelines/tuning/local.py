"""What candidates do inside layers: a watcher that runs each of them on what attention got in a dense run."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import MappingProxyType

import torch

from visattn.attend import attention
from visattn.patterns.choice.memory import Memory, Place, placed
from visattn.staged import with_precision
from visattn.timing import per_call
from visattn.tuning.ages import growth, sharing
from visattn.tuning.candidates import HOPELESS, is_steady
from visattn.tuning.subject import DENSE, Local
from visattn.watch import Watched

# Measurements of a candidate's time, and sites of one shape at which it is measured if it depends on no values.
TURNS, TIMED = 3, 4
# Calls of one on a GPU, one behind the other as in a model; seconds from which one measurement is enough.
CALLS, LONG = 4, 0.02
# Samples whose error is measured, of both halves of guidance; times are of all.
SAMPLES = 4
# Cycles of a GPU in a second, at least.
CLOCK = 2.0e9


class Probe:
    """Runs every candidate on the calls of one step, one call at a time, so that nothing is kept but numbers.

    Candidates that keep lists for several steps (`every`) choose them on a call of an earlier step, so many steps
    before that they are as old as they are in the mean; their time is the mean of calls that choose and calls that
    take what was chosen. What steps share is kept likewise, on the host until it serves; its error is that of its age,
    from which that of all its steps follows (`visattn.tuning.ages`).

    Attributes:
        found: Errors and times of candidates, by site; those of several calls of a site are means.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        step: int,
        weight_of: Callable[[str, int], torch.Tensor | None],
        timed: Collection[str] | None = None,
        of_site: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Watch.

        Args:
            candidates: Texts of patterns.
            step: The denoising step.
            weight_of: Output projection of a site with so many channels.
            timed: Candidates whose time is measured, None for all; that of the others is 0.
            of_site: Those that are run at a site; all where it says nothing of one.
        """
        self._of_site = of_site
        read = {name: with_precision(name) for name in candidates}
        self._patterns = {name: pattern for name, (pattern, _) in read.items()}
        self._precisions = {name: precision for name, (_, precision) in read.items()}
        self._step, self._weight_of = step, weight_of
        self._timed = set(candidates if timed is None else timed)
        self._chosen_at = {name: max(0, step - self._every(name) // 2) for name in self._patterns}
        self._memories: dict[tuple[str, int, str], Memory] = {}
        self._choosing: dict[tuple[str, int, str], float] = {}
        self._seen: dict[str, dict[str, list[Local]]] = {}
        # What times depend on beside values, by site; times of candidates that depend on nothing else.
        self._shapes: dict[str, Hashable] = {}
        self._steady: dict[tuple[Hashable, str], list[float]] = {}
        self._failed: set[str] = set()
        # By what their time depends on.
        self._hopeless: set[tuple[Hashable, str]] = set()
        # Calls of each site in a step so far.
        self._calls: dict[tuple[str, int], int] = {}

    def __call__(self, watched: Watched) -> None:
        """Run the candidates on a call."""
        step = watched.step
        if step is None or len(watched.layouts) != 1:
            return
        (layout,) = watched.layouts
        shape = self._shapes[watched.site] = watched.q.shape, watched.k.shape, layout
        number = self._calls[watched.site, step] = self._calls.get((watched.site, step), -1) + 1
        names = self._of_site.get(watched.site, tuple(self._patterns))
        for name in names:
            chooses = self._every(name) > 1 and step == self._chosen_at[name]
            # What is kept in the step itself is of no age, and says nothing of later ones.
            fresh = step == self._step and sharing(name) is not None
            if chooses and not fresh and (shape, name) not in self._hopeless:
                self._choose(watched, (watched.site, number, name))
        if step != self._step:
            return
        weight = self._weight_of(watched.site, watched.v.shape[2] * watched.v.shape[3])
        dense = _projected(_some(watched.out), weight)
        size = dense.square().sum()
        here = self._seen.setdefault(watched.site, {})
        for name in names:
            if (shape, name) in self._hopeless:
                continue
            local = self._try(watched, (watched.site, number, name), dense, size, weight)
            if local is not None:
                here.setdefault(name, []).append(local)
        self._give_up(shape, here)
        # What was kept for this call has served.
        self._memories = {key: kept for key, kept in self._memories.items() if key[:2] != (watched.site, number)}

    def _give_up(self, shape: Hashable, here: Mapping[str, Sequence[Local]]) -> None:
        """Leave out at sites of a shape what takes longer than dense attention and as long at each of them."""
        longest = HOPELESS * here[DENSE][-1].seconds if DENSE in here else 0.0
        slow = {name for name, values in here.items() if is_steady(name) and values[-1].seconds > longest > 0}
        self._hopeless |= {(shape, name) for name in slow - {DENSE}}

    def _choose(self, watched: Watched, key: tuple[str, int, str]) -> None:
        """Choose lists for a later step, and measure how long that takes."""
        empty = Memory()
        empty.begin(None, self._chosen_at[key[2]], None)
        memory = empty.copy()
        try:
            self._run(watched, key[2], Place(memory, key))
            if self._times(key, len([k for k in self._choosing if self._alike(k, key)])):
                self._choosing[key] = _seconds(watched, lambda: self._run(watched, key[2], Place(empty.copy(), key)))
        except Exception as error:
            self._leave_out(key, error)
            return
        # Outputs of all modules and candidates are more than a device holds.
        memory.move("cpu")
        self._memories[key] = memory

    def _try(
        self,
        watched: Watched,
        key: tuple[str, int, str],
        dense: torch.Tensor,
        size: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> Local | None:
        # Without a memory: each call chooses, as the first of those that share a choice does.
        memory: Memory | None = None
        if self._every(key[2]) > 1:
            if key not in self._memories:
                return None
            memory = self._memories[key]
            memory.move(watched.q.device)
            memory.begin(None, self._step, None)

        def run() -> torch.Tensor:
            # A call lets go what no later step takes.
            return self._run(watched, key[2], Place(None) if memory is None else Place(memory.copy(), key))

        try:
            out = run()
            times = self._times(key, len(self._steady.get((self._shapes[watched.site], key[2]), ())))
            seconds = _seconds(watched, run) if times else 0.0
        except Exception as error:
            self._leave_out(key, error)
            return None
        off = 0.0
        if key[2] != DENSE:
            off = float((_projected(_some(out), weight) - dense).square().sum() / size)
        every = self._every(key[2])
        if sharing(key[2]) is not None:
            off *= growth(every, every) / (self._step - self._chosen_at[key[2]]) ** 2
        if every > 1:
            seconds = (self._choosing.get(key, 0.0) + (every - 1) * seconds) / every
        if seconds and is_steady(key[2]):
            self._steady.setdefault((self._shapes[watched.site], key[2]), []).append(seconds)
        return Local(off, seconds)

    def _run(self, watched: Watched, name: str, place: Place) -> torch.Tensor:
        """A candidate on what attention got in a call."""
        options = {"scale": watched.scale, "key_mask": watched.key_mask, "precision": self._precisions[name]}
        with placed(place):
            return attention(watched.q, watched.k, watched.v, self._patterns[name], watched.layouts[0], **options)

    def _every(self, name: str) -> int:
        """Steps that a candidate keeps its lists for."""
        return getattr(self._patterns[name], "every", 1)

    def _times(self, key: tuple[str, int, str], so_far: int) -> bool:
        """Whether the time of a candidate is measured at a site, when so many of its shape had it measured."""
        return key[2] in self._timed and (so_far < TIMED or not is_steady(key[2]))

    def _alike(self, one: tuple[str, int, str], other: tuple[str, int, str]) -> bool:
        """Whether two keys are of one candidate at sites of one shape."""
        return one[2] == other[2] and self._shapes[one[0]] == self._shapes[other[0]]

    def _leave_out(self, key: tuple[str, int, str], error: Exception) -> None:
        """Say once why a candidate does not run: not on this grid, beside a mask, or its kernel fails to compile."""
        site, _, name = key
        if name not in self._failed:
            self._failed.add(name)
            warnings.warn(f"candidate {name} is left out at {site}: {error}", stacklevel=3)

    @property
    def found(self) -> Mapping[str, Mapping[str, Local]]:
        """Means over the calls of each site; candidates that did not run on all of them are left out."""
        result = {}
        for site, here in self._seen.items():
            most = max(len(values) for values in here.values())
            result[site] = {
                name: Local(statistics.fmean(v.error for v in values), self._time(site, name, values))
                for name, values in here.items()
                if len(values) == most and (self._shapes[site], name) not in self._hopeless
            }
        return result

    def _time(self, site: str, name: str, values: Sequence[Local]) -> float:
        """Time of all calls of a site in a step."""
        steady = self._steady.get((self._shapes[site], name))
        return statistics.median(steady) * len(values) if steady else sum(value.seconds for value in values)


def _some(out: torch.Tensor) -> torch.Tensor:
    """Samples from the whole of a batch, which has those with and without a prompt in parts of its own."""
    return out[:: max(1, out.shape[0] // SAMPLES)]


def _seconds(watched: Watched, run: Callable[[], object]) -> float:
    """Time of a call that has run before, the median of some measurements."""
    if watched.q.device.type != "cuda":
        first = per_call(run, 1)
        return first if first > LONG else statistics.median([first, *(per_call(run, 1) for _ in range(TURNS - 1))])
    with torch.cuda.device(watched.q.device):
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        # How long the host needs for the calls, and not less than their time on the device.
        torch.cuda.synchronize()
        ahead = time.perf_counter() - start
        # Long calls vary little, and take the time of the search.
        turns = TURNS if ahead < LONG else 1
        return statistics.median(_device_seconds(run, ahead) for _ in range(turns))


def _device_seconds(run: Callable[[], object], ahead: float) -> float:
    """Time of a call on the GPU, which spins for a while first: the host is ahead of it, as in a model of this size."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(ahead, 0.02) * CLOCK))
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / CALLS


def _projected(out: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Attention [B, S, H, D] behind the output projection, in float32."""
    flat = out.flatten(2).float()
    return flat if weight is None else flat @ weight.to(flat.device, torch.float32).T
