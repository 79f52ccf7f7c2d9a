"""Time, memory and operations of a model of timm or transformers, stock against swapped."""

from __future__ import annotations

import copy
import ctypes
import difflib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import visattn.models  # noqa: F401  registers the backbones
from visattn.attend import attention
from visattn.handle import apply
from visattn.memory import is_shortage
from visattn.models.load import check_known, said_by_timm
from visattn.problem import Problem
from visattn.timing import Timing, interleave


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        seconds: Of a forward.
        memory: Bytes that a forward needs at its peak beyond what was there before it; None if unknown.
        flops: Operations of a forward; of the swapped model those of visible pairs.
        attention: Seconds of one attention call alone, on random inputs; None for the stock side of a model whose own
            attention is not dense over the same tokens (windows, position logits).
    """

    seconds: Timing
    memory: int | None
    flops: float
    attention: Timing | None


@dataclass(frozen=True)
class Comparison:
    """A model at one image size.

    Attributes:
        name: Of the model.
        size: Side of the image in pixels.
        tokens: Length of the longest sequence.
        pattern: The pattern's text.
        backend: Who ran most calls.
        density: Mean visible share of all pairs.
        stock: The model as it is.
        swapped: The model with the pattern.
    """

    name: str
    size: int
    tokens: int
    pattern: str
    backend: str
    density: float | None
    stock: Side
    swapped: Side

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        found = {key: getattr(self, key) for key in ("name", "size", "tokens", "pattern", "backend", "density")}
        for key in ("stock", "swapped"):
            side: Side = getattr(self, key)
            alone = None if side.attention is None else side.attention.to_dict()
            times = {"seconds": side.seconds.to_dict(), "attention": alone}
            found[key] = {**times, "memory": side.memory, "flops": side.flops}
        return found


def create(name: str, size: int, **kwargs: Any) -> torch.nn.Module:
    """A model for images of `size` pixels per side, with random weights.

    Args:
        name: Of a model of timm, or "transformers:" and a type of models there.
        size: Side of the images.
        kwargs: `device`, or more for timm.

    Raises:
        ValueError: If the name is unknown, or the model does not take the size.
    """
    library, _, kind = name.rpartition(":")
    if library == "transformers":
        return _create_in_transformers(kind, size, **kwargs)
    check_known(name)
    try:
        return timm.create_model(name, img_size=size, **kwargs).eval()
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **kwargs).eval()


def _create_in_transformers(kind: str, size: int, device: str = "cpu") -> torch.nn.Module:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if kind not in CONFIG_MAPPING:
        # What transformers says itself lists all of its types.
        near = difflib.get_close_matches(kind, CONFIG_MAPPING, 3, 0.6)
        said = f"did you mean {' or '.join(near)}?" if near else "visattn models has the towers that take a pattern"
        raise ValueError(f"transformers makes no model of type {kind!r}: {said}")
    try:
        config = AutoConfig.for_model(kind)
        # Some types keep both sides, and refuse one.
        both = isinstance(getattr(config, "image_size", None), list | tuple)
        config = AutoConfig.for_model(kind, image_size=[size, size] if both else size)
        with torch.device(device):
            model = AutoModel.from_config(config).eval()
    except ValueError as error:
        raise ValueError(f"transformers makes no model of type {kind!r}: {str(error).splitlines()[0]}") from None
    if model.main_input_name != "pixel_values" or hasattr(config, "text_config") or hasattr(config, "tubelet_size"):
        raise ValueError(f"a {kind} of transformers takes more than images, or videos: name the type of an image tower")
    return model


def check_size(name: str, size: int) -> None:
    """Run a model on an image without data: says that a size does not fit before anything is measured.

    Raises:
        ValueError: If the model is unknown or does not take the size.
        MemoryError: If the size is beyond any memory.
    """
    with torch.inference_mode(), said_by_timm(name, size), _said_of_memory(name, size, "any device"):
        create(name, size, device="meta")(torch.empty(1, 3, size, size, device="meta"))


@contextmanager
def _said_of_memory(name: str, size: int, device: str) -> Iterator[None]:
    """Turns torch's errors of memory that is not there into a MemoryError that names model and size."""
    try:
        yield
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise MemoryError(
            f"{name} at {size} pixels needs more memory than there is on {device}: choose a smaller size or batch"
        ) from None


@torch.inference_mode()
def compare(
    name: str, size: int, pattern: str, *, batch: int = 1, repeats: int = 3, device: str = "cpu", backend: str = "auto"
) -> Comparison:
    """Measure a model stock and swapped, in turns.

    Args:
        name: A model of timm, or "transformers:" and a type of models there.
        size: Side of the image in pixels.
        pattern: A pattern's text.
        batch: Images per forward.
        repeats: Measurements of each.
        device: Where.
        backend: Of the swapped attention.

    Raises:
        ValueError: If the model is unknown, cannot be swapped, or does not take the pattern or the size.
        MemoryError: If there is too little memory.
    """
    with _said_of_memory(name, size, device):
        return _compare(name, size, pattern, batch, repeats, device, backend)


def _compare(name: str, size: int, pattern: str, batch: int, repeats: int, device: str, backend: str) -> Comparison:
    torch.manual_seed(0)
    model = create(name, size).to(device)
    x = torch.randn(batch, 3, size, size, device=device)

    swapped = copy.deepcopy(model)
    # What is measured is the pattern, also where it does not pay.
    handle = apply(swapped, pattern, backend=backend, always=True)
    with said_by_timm(name, size):
        swapped(x)
    report = handle.report()
    calls = [call for site in report.sites for call in site.calls]
    if not calls:
        raise ValueError(
            f"{pattern} ran nowhere in {name} at {size} pixels: {report.fallbacks or 'all calls are dense'}"
        )
    longest = max(calls, key=lambda call: call.problem.layout.length)
    times = interleave({"stock": lambda: model(x), "swapped": lambda: swapped(x)}, repeats=repeats)
    ran = [site for site in report.sites if site.calls]
    flops, replaced = _flops(name, size, batch, [site.site for site in ran])
    dense = [(call, call.hits * _dense_flops(call.problem)) for site in ran for call in site.calls]
    visible = sum(flops * (call.density or 0) for call, flops in dense)
    is_dense = math.isclose(replaced, sum(flops for _, flops in dense))
    alone = _attention_alone(longest.problem, repeats, device, backend, is_dense)
    return Comparison(
        name=name,
        size=size,
        tokens=longest.problem.layout.length,
        pattern=pattern,
        backend=longest.backend,
        density=report.density,
        stock=Side(times["stock"], peak_memory(lambda: model(x), device), flops, alone.get("stock")),
        swapped=Side(
            times["swapped"], peak_memory(lambda: swapped(x), device), flops - replaced + visible, alone["swapped"]
        ),
    )


def _attention_alone(problem: Problem, repeats: int, device: str, backend: str, is_dense: bool) -> dict[str, Timing]:
    """One call of the pattern, and of SDPA if that is what it replaces, on random inputs of a problem's shape."""
    shape = problem.batch, problem.layout.length, problem.heads, problem.head_dim
    q, k, v = (torch.randn(shape, dtype=problem.dtype, device=device) for _ in range(3))
    first, second, third = (t.transpose(1, 2) for t in (q, k, v))
    runs: dict[str, Callable[[], object]] = {}
    if is_dense:
        runs["stock"] = lambda: F.scaled_dot_product_attention(first, second, third)
    runs["swapped"] = lambda: attention(q, k, v, problem.pattern, problem.layout, backend=backend)
    return interleave(runs, repeats=repeats)


def _dense_flops(problem: Problem) -> float:
    """Operations of dense attention: two products of queries and keys or values."""
    return 4.0 * problem.dense_pairs * problem.head_dim


def _flops(name: str, size: int, batch: int, sites: Sequence[str]) -> tuple[float, float]:
    """Operations of a stock forward, counted without computing, and those of them that a swap of sites replaces."""
    model = create(name, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(batch, 3, size, size, device="meta"))
    counts = counter.get_flop_counts()
    replaced = 0.0
    for site in sites:
        # Products between activations; projections are products with weights (addmm, mm, convolutions).
        for operator, flops in counts.get(f"{type(model).__name__}.{site}", {}).items():
            if "bmm" in str(operator) or "scaled_dot_product" in str(operator):
                replaced += flops
    return float(counter.get_total_flops()), replaced


def peak_memory(run: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs beyond what was there before; None where the system does not tell.

    On CUDA what torch allocated; on Linux the high-water mark of the process, which is set back first.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed but not given back would hide growth
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmHWM")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, LookupError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(key)]
    return found[0]
