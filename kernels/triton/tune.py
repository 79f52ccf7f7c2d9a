"""Opt-in tuning: VISATTN_AUTOTUNE=1 times a few configurations once and remembers the fastest on disk.

The file is $VISATTN_CACHE/triton.json, by default in the user's cache folder. Its keys name everything that a choice
depends on: GPU, triton, dtype, head dim, direction, pattern and layout. Calls like an earlier one keep what that was
decided with: set the variable before the first, or call `clear_caches()`.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from visattn.files import add_values, cache_folder, read_values
from visattn.kernels.triton.config import DIRECTIONS, Config, config
from visattn.layout import Layout
from visattn.patterns import Pattern, RoutedPattern
from visattn.patterns.kinds import with_pooled_keys
from visattn.problem import Call

# Heads of the problem that is timed: enough programs to fill a GPU on any layout worth tuning.
HEADS = 4
REPEATS = 5


def enabled() -> bool:
    """Whether the user asked for tuning."""
    return os.environ.get("VISATTN_AUTOTUNE", "0") not in ("", "0")


def cache_file() -> Path:
    """Where choices are remembered."""
    return cache_folder() / "triton.json"


def candidates(architecture: int, dtype: torch.dtype, head_dim: int, direction: str) -> list[Config]:
    """Configurations worth timing: the table's, and its neighbours in tile size, warps and stages."""
    first = config(architecture, dtype, head_dim, direction)
    found = [first]
    for rows in (first.rows // 2, first.rows, first.rows * 2):
        for columns, per_step in ((first.columns, first.per_step), (2 * first.columns, 1), (2 * first.columns, 2)):
            for warps, stages in ((first.warps, first.stages), (first.warps, 2), (4, 2), (8, 3)):
                near = Config(rows, columns, warps, stages, per_step)
                whole_words = per_step == 1 or near.tile % 32 == 0
                if near not in found and 16 <= rows <= 128 and columns <= 128 and whole_words:
                    found.append(near)
    return found


def tuned(
    pattern: Pattern, layout: Layout, dtype: torch.dtype, head_dim: int, device: torch.device
) -> dict[str, Config]:
    """The fastest configuration of each direction, from the file or by timing it now."""
    from visattn.kernels.triton.backend import architecture

    number, path = architecture(device), cache_file()
    known = read_values(path)
    chosen = {d: config(number, dtype, head_dim, d) for d in DIRECTIONS}
    for direction in DIRECTIONS:
        key = _key(pattern, layout, dtype, head_dim, device, direction)
        if key not in known:
            clock = timer(pattern, layout, dtype, head_dim, device, direction, dict(chosen))
            best = fastest(candidates(number, dtype, head_dim, direction), clock)
            known[key] = list(best)
            add_values(path, {key: list(best)})
        chosen[direction] = Config(*known[key])
    return chosen


def fastest(choices: list[Config], time: Callable[[Config], float]) -> Config:
    """The configuration that takes least time; those that the GPU cannot launch do not count.

    Raises:
        RuntimeError: If none can be launched.
    """
    times: dict[Config, float] = {}
    failed = ""
    for choice in choices:
        try:
            times[choice] = time(choice)
        except Exception as error:  # out of shared memory or registers, whatever the driver calls it
            failed = f"{type(error).__name__}: {error}"
    if not times:
        raise RuntimeError(f"no Triton configuration could be launched; the last one failed with {failed}")
    return min(times, key=lambda c: times[c])


def _key(
    pattern: Pattern, layout: Layout, dtype: torch.dtype, head_dim: int, device: torch.device, direction: str
) -> str:
    import triton

    name = torch.cuda.get_device_name(device)
    return " | ".join([name, triton.__version__, str(dtype), str(head_dim), direction, str(pattern), str(layout)])


def timer(
    pattern: Pattern,
    layout: Layout,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    direction: str,
    configs: dict[str, Config],
) -> Callable[[Config], float]:
    """A function that times one direction under a configuration, in milliseconds."""
    from visattn.kernels.triton.choosing.skipped import SkippingLists
    from visattn.kernels.triton.prepared import Kernels

    lengths = layout.length, layout.keys.length, layout.keys.length
    q, k, v = (torch.randn(1, n, HEADS, head_dim, device=device, dtype=dtype) for n in lengths)
    k, v, _ = with_pooled_keys(pattern, k, v, None, layout)
    call = Call(pattern, layout, head_dim**-0.5)

    def time(choice: Config) -> float:
        made = configs | {direction: choice}
        kernels = Kernels(q, k, v, call, False, lambda *_: made, lambda: None)
        routed = kernels.lists(q, k, v, None, True) if isinstance(pattern, RoutedPattern) else None
        out, lse = kernels.forward(q, k, v, None, None, True, routed)
        assert lse is not None and not isinstance(routed, SkippingLists)
        saved = q, k, v, None, out, lse
        wanted = (direction == "query_grad", direction == "key_grad", False)

        def run() -> None:
            if direction == "forward":
                kernels.forward(q, k, v, None, None, False, routed)
            else:
                kernels.backward(saved, out, None, wanted, None, routed)

        return _median_ms(run)

    return time


def _median_ms(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
