"""What a backend is, which ones there are, and which one runs a call."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch

from visattn.given import said
from visattn.patterns import ListedPattern, RoutedPattern
from visattn.plans import TilePlan, plan
from visattn.problem import Call, Problem, Support
from visattn.registry import REGISTRY

# Runs calls that are alike, with their q, k, v, key mask and bias; gives output and log-sum-exp as `Backend.run` does.
Prepared = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor | None],
]


class Backend(ABC):
    """Runs attention calls it supports.

    Attributes:
        name: What users call it.
        portable: Whether it consists of operators of torch alone, tables as constants, so that exporters and tracers
            can write down what it does.
        key_layouts: Whether it runs calls whose keys have a layout of their own; the others are not asked for those.
        precisions: Those of `problem.PRECISIONS` that it computes in; it is not asked for others.
    """

    name: ClassVar[str]
    portable: ClassVar[bool] = False
    key_layouts: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def available(self) -> Support:
        """Whether this machine has what the backend needs."""

    @abstractmethod
    def supports(self, problem: Problem) -> Support:
        """Whether it can run the call where it is available; the reason completes "NAME cannot run this call: ..."."""

    @abstractmethod
    def cost(self, problem: Problem) -> float:
        """Estimated time, in pairs of tokens that dense unmasked SDPA computes in the same time."""

    @abstractmethod
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of a supported call, differentiable in q, k, v and rpb.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, N + extra, Hkv, D] with N = call.layout.keys.length, which is S unless keys have a layout of
                their own; extra keys are those that the pattern appends.
            v: Values [B, N + extra, Hkv, D].
            call: Everything else; its key mask is [B, N + extra].

        Returns:
            Output [B, S, H, D], and the natural log-sum-exp [B, S, H] if `call.lse`, else None or that anyway.
            A query without any visible key gives zeros and -inf.
        """

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, grown: Callable[[], None]
    ) -> Prepared:
        """What runs calls like this one, which differ in the values of tensors alone; by default it runs them anew.

        Args:
            q: Queries of the first call.
            k: Its keys.
            v: Its values.
            call: Everything else of it; it has no parameters, and its key mask or bias may be another next time.
            grown: To be called when the result has come to hold more tensors, which are kept with it.
        """
        return partial(_anew, self.run, replace(call, key_mask=None, rpb=None))

    def compiled(self) -> str:
        """What it has compiled on this machine and keeps, in words; empty if nothing or if others say so."""
        return ""

    def adds_tail(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> bool:
        """Whether `run` itself adds what a pattern with a tail adds behind the softmax, and so does what it prepares.

        Else it gets the pattern's `front`, and what is added is computed by operators of torch. The arguments are those
        of `run`, whose pattern has a tail.
        """
        return False

    def keeps_results(self, problem: Problem) -> bool:
        """Whether compiled code keeps output and log-sum-exp for the backward, instead of running the call again there.

        What `prepare` gives has a method `gradients` then, see `visattn.kernels.triton.ready.Ready`.
        """
        return False


def _anew(run: Any, call: Call, q: Any, k: Any, v: Any, key_mask: torch.Tensor | None, rpb: torch.Tensor | None) -> Any:
    if key_mask is not None or rpb is not None:
        call = replace(call, key_mask=key_mask, rpb=rpb)
    return run(q, k, v, call)


def _accept(name: str, backend: Any) -> Backend:
    if not isinstance(backend, Backend):
        raise ValueError(f"{said(backend)} must be an object of a subclass of visattn.dispatch.Backend")
    if getattr(backend, "name", None) != name or not name.isidentifier() or name == "auto":
        raise ValueError(f"{backend!r} must have the name that it is registered by, a word: {name!r}")
    return backend


# Backends by name, in order of preference where two cost the same.
BACKENDS = REGISTRY.declare(
    "backend",
    {
        "triton": "visattn.kernels.triton.backend:backend",
        "fa4": "visattn.kernels.fa4.backend:backend",
        "agent": "visattn.kernels.agent.backend:backend",
        "linear": "visattn.kernels.linear.backend:backend",
        "sparse_linear": "visattn.kernels.linear.sparse_linear:backend",
        "sigmoid": "visattn.kernels.sigmoid:backend",
        "clipped": "visattn.kernels.clipped:backend",
        "wrapped": "visattn.kernels.wrapped:backend",
        "sharing": "visattn.kernels.sharing:backend",
        "heads": "visattn.kernels.heads:backend",
        "gate": "visattn.kernels.gate:backend",
        "hybrid": "visattn.kernels.hybrid.backend:backend",
        "ordered": "visattn.kernels.ordered:backend",
        "centroids": "visattn.kernels.centroids:backend",
        "sdpa": "visattn.kernels.sdpa:backend",
        "tiles": "visattn.kernels.tiles.backend:backend",
        "flex": "visattn.kernels.flex.backend:backend",
        "natten": "visattn.kernels.natten:backend",
        "xformers": "visattn.kernels.xformers:backend",
        "reference": "visattn.kernels.reference:backend",
    },
    _accept,
)


class Candidate(NamedTuple):
    """A backend's verdict on one call."""

    backend: Backend
    support: Support
    cost: float


def load(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"unknown backend {said(name)}; backends: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def candidates(problem: Problem) -> Iterator[Candidate]:
    """Every backend's verdict on a call, in order of preference."""
    for backend in BACKENDS.usable().values():
        support = available(backend)
        yield offer(backend, problem) if support.ok else Candidate(backend, support, float("inf"))


def verdict(backend: Backend, problem: Problem) -> Support:
    """Whether a backend is here and runs a call."""
    support = available(backend)
    return offer(backend, problem).support if support.ok else support


def available(backend: Backend) -> Support:
    """Whether this machine has what a backend needs; one of another package that fails to say so is not there."""
    try:
        return backend.available()
    except Exception as error:
        return _failed(backend, error)


def offer(backend: Backend, problem: Problem) -> Candidate:
    """Whether a backend runs a call where it is available, and at which cost."""
    if problem.layout.key_layout is not None and not backend.key_layouts:
        return Candidate(backend, Support(False, "it takes queries and keys of one layout only"), float("inf"))
    if problem.precision is not None and problem.precision not in backend.precisions:
        return Candidate(backend, Support(False, f"it does not compute in {problem.precision}"), float("inf"))
    try:
        support = backend.supports(problem)
        return Candidate(backend, support, backend.cost(problem) if support.ok else float("inf"))
    except Exception as error:
        return Candidate(backend, _failed(backend, error), float("inf"))


def _failed(backend: Backend, error: Exception) -> Support:
    """What an exception of another package's backend means; those of our own are raised on."""
    if BACKENDS.is_own(backend.name):
        raise error
    reason = f"it fails to say whether it can with {type(error).__name__}: {error}"
    warnings.warn(f"backend {backend.name!r} is left out: {reason}", stacklevel=4)
    return Support(False, reason)


def choose(problem: Problem, name: str = "auto") -> Backend:
    """The backend that runs a call: the named one, or with "auto" the cheapest that supports it.

    Raises:
        ValueError: If the name is unknown, or the named backend (or all of them) cannot run the call.
    """
    if not isinstance(name, str):
        raise ValueError(f"unknown backend {said(name)}; backends: auto, {', '.join(BACKENDS)}")
    return _choose(problem, name, REGISTRY.version, current_gpu(problem.device), torch.get_num_threads())


def choose_portable(problem: Problem) -> Backend:
    """The cheapest portable backend for a call, whatever exports it.

    Raises:
        ValueError: If none supports it.
    """
    # Exported code runs batches of any size.
    problem = replace(problem, batch=1)
    try:
        return cheapest(problem, (backend for backend in BACKENDS.usable().values() if backend.portable))
    except ValueError as error:
        raise ValueError(f"this call cannot be exported, for it needs kernels of its own: {error}") from None


def current_gpu(device: str) -> int:
    """Which GPU backends are asked about for this type of device: the current one, -1 where none is used yet."""
    return torch.cuda.current_device() if device == "cuda" and torch.cuda.is_initialized() else -1


# Version, GPU and threads are part of the key: another set of backends, or another GPU, is another choice, and what a
# call costs beside its pairs weighs more on more threads.
@lru_cache(maxsize=1024)
def _choose(problem: Problem, name: str, version: int, gpu: int, threads: int) -> Backend:
    if name == "auto":
        return cheapest(problem, BACKENDS.usable().values())
    backend = load(name)
    support = verdict(backend, problem)
    if not support.ok:
        raise ValueError(f"backend {name!r} cannot run this call: {support.reason}; pass backend='auto'")
    return backend


def cheapest(problem: Problem, backends: Iterable[Backend]) -> Backend:
    """The backend that is here, supports a call and costs the least; of equal ones the first.

    Raises:
        ValueError: If none can run the call.
    """
    offers = [offer(backend, problem) for backend in backends]
    # `available` comes last: it may import a large package, for a backend that is not the cheapest anyway.
    for each in sorted((each for each in offers if each.support.ok), key=lambda each: each.cost):
        if available(each.backend).ok:
            return each.backend
    reasons = "; ".join(f"{each.backend.name}: {verdict(each.backend, problem).reason}" for each in offers)
    raise ValueError(f"no backend can run {problem.pattern} on {problem.layout}: {reasons}")


def visited_pairs(problem: Problem, tiles: TilePlan | None = None) -> float:
    """Pairs of token slots that a tile engine computes, all samples and heads together.

    Args:
        problem: The call.
        tiles: The plan the engine runs, the pattern's own choice of tiles if None.
    """
    return problem.dense_pairs / (tiles or plan(problem.pattern, problem.layout)).tile_bound


def unlisted(problem: Problem) -> str:
    """Why a pattern is no list of tiles known before q and k, empty if it is."""
    pattern = problem.pattern
    if not isinstance(pattern, ListedPattern):
        return f"{pattern.name} is not a list of key tiles"
    if isinstance(pattern, RoutedPattern):
        return f"{pattern.name} computes its lists from q and k"
    return ""


# Floating-point operations per second of dense SDPA at full load on one thread of a CPU with AVX-512, in any dtype
# (docs/cpu-engine.md), and on an H100 in single precision and, by the channels per head that its kernels compute
# (docs/performance.md), in half precision. They turn a fixed time per call into pairs, and pairs into estimated times.
THREAD_RATE = 8.5e10
SINGLE_RATE = 3.2e13
HALF_RATE = {64: 4.7e14, 128: 6.6e14, 256: 5e14}
# What an operator in compiled code keeps the host beyond its body, in microseconds, and what a call of torch's own
# attention keeps it there, as a share of an eager one (scripts/check/crossing_gpu.py, chains of compiled calls).
OPERATOR_US, COMPILED = 10, 0.75


def dense_rate(problem: Problem) -> float:
    """Operations per second of dense SDPA at full load."""
    if problem.device != "cuda":
        return THREAD_RATE * torch.get_num_threads()
    if problem.dtype.itemsize != 2:
        return SINGLE_RATE
    # Kernels compute whole powers of two of channels.
    computed = next((dim for dim in HALF_RATE if problem.head_dim <= dim), 256)
    return HALF_RATE[computed] * min(1.0, problem.head_dim / computed)


def overhead(problem: Problem, cpu_ms: float, cuda_us: float) -> float:
    """A fixed time per call in pairs of tokens that dense SDPA computes in that time."""
    seconds = cuda_us * 1e-6 if problem.device == "cuda" else cpu_ms * 1e-3
    return seconds * dense_rate(problem) / (4 * problem.head_dim)


def milliseconds(problem: Problem, pairs: float) -> float:
    """The time in which dense SDPA computes so many pairs."""
    return 4e3 * problem.head_dim * pairs / dense_rate(problem)


def wall(problem: Problem, pairs: float, cpu_ms: float, host_us: float, operator: bool = True) -> float:
    """Wall time of a call, in pairs: on a GPU the longer of its own work and the host's, which go on side by side.

    Args:
        problem: The call.
        pairs: Work of the device.
        cpu_ms: Fixed time per call on a CPU.
        host_us: What an eager call keeps the host of a GPU.
        operator: Whether compiled code calls an operator of ours for it.
    """
    if problem.device != "cuda":
        return pairs + overhead(problem, cpu_ms, 0)
    if problem.mode == "captured":
        return pairs
    if problem.mode == "compiled":
        host_us = host_us + OPERATOR_US if operator else host_us * COMPILED
    return max(pairs, overhead(problem, 0, host_us))
