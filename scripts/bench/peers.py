"""Peers of our kernels: whole calls of other packages on the same q, k and v, or why they do not run a case.

What a peer computes is compared with our own output and gradients before it is timed: a call that is fast and wrong is
no peer.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from visattn import Layout, attention, parse
from visattn.dispatch import load, verdict
from visattn.patterns import Neighborhood
from visattn.problem import Call, Problem

# An attention function of q, k and v, and these.
Contender = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]
# Their backends, and the packages behind those.
PACKAGES = {"flex": "torch", "natten": "natten", "fa4": "flash-attn-4"}
# Relative distance of outputs and of gradients from ours in bfloat16 that is more than rounding.
APART = 2e-2


def package_versions(names: list[str]) -> dict[str, str]:
    """The versions of the packages behind some peers, of those that are installed."""
    found = {}
    for name in names:
        try:
            found[PACKAGES[name]] = importlib.metadata.version(PACKAGES[name])
        except (KeyError, importlib.metadata.PackageNotFoundError):
            continue
    return found


def by_natten(pattern: Neighborhood, layout: Layout, inputs: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A call of NATTEN as its users write it, on tokens of a grid alone, with the tiles that are fastest here."""
    import natten

    run = getattr(natten, f"na{layout.dims}d")
    window, stride, dilation, causal = zip(*pattern.axes(layout.grid), strict=True)
    # It takes no stride beyond the window.
    steps = tuple(map(min, stride, window))

    def call(tiles: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grid = (t.unflatten(1, layout.grid) for t in (q, k, v))
        out = run(*grid, kernel_size=window, stride=steps, dilation=dilation, is_causal=causal, **tiles)
        return out.flatten(1, layout.dims)

    grid = [t.unflatten(1, layout.grid) for t in inputs]
    forwards = [
        {"q_tile_shape": queries, "kv_tile_shape": keys, "kernel_schedule": schedule}
        for (queries, keys), schedule in natten.get_configs_for_cutlass_hopper_fna(*grid)
    ]
    backwards = [
        {"backward_q_tile_shape": queries, "backward_kv_tile_shape": keys}
        for queries, keys in natten.get_bwd_configs_for_cutlass_hopper_fna(*grid)
    ]
    with torch.no_grad():
        tiles = _fastest([partial(call, forward) for forward in forwards], inputs)
    forward = forwards[tiles] if forwards else {}
    leaves = [t.detach().requires_grad_() for t in inputs]
    whole = [forward | backward for backward in backwards]
    tiles = _fastest([lambda *given, own=own: call(own, *given).sum().backward() for own in whole], leaves)
    chosen = whole[tiles] if whole else forward
    print(f"NATTEN runs {pattern} on {layout} by {chosen}", flush=True)
    return partial(call, chosen)


def _fastest(runs: list[Callable[..., Any]], inputs: list[torch.Tensor]) -> int:
    """Which of some functions takes the least time on the GPU, each run three times; those that raise are slowest."""
    times = []
    for run in runs:
        try:
            times.append(min(_milliseconds(run, inputs) for _ in range(3)))
        except RuntimeError:
            times.append(float("inf"))
    return times.index(min(times)) if times else 0


def _milliseconds(run: Callable[..., Any], inputs: list[torch.Tensor]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(*inputs)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peer(name: str, pattern: str, layout: Layout, inputs: list[torch.Tensor]) -> Contender:
    """The whole call of a peer.

    Args:
        name: A backend, as one of `PACKAGES`.
        pattern: What queries see.
        layout: The tokens.
        inputs: q, k and v [B, S, H, D].

    Raises:
        ValueError: If the peer does not run the call, with its reason.
    """
    q, k, v = inputs
    parsed = parse(pattern)
    support = verdict(load(name), Problem.of(q, k, v, Call(parsed, layout, q.shape[-1] ** -0.5)))
    if not support.ok:
        raise ValueError(support.reason)
    if name != "natten":
        return partial(attention, pattern=pattern, layout=layout, backend=name), inputs
    import natten

    if not natten.HAS_LIBNATTEN:
        raise ValueError("natten was installed without its CUDA kernels")
    if layout.tokens < layout.length:
        raise ValueError("NATTEN merges tokens beside the grid by a second call; it is timed without them")
    assert isinstance(parsed, Neighborhood)
    return by_natten(parsed, layout, inputs), inputs


def checked(contender: Contender, truth: Callable[..., torch.Tensor]) -> Contender:
    """The contender, if its output and gradients are those of another function on the same inputs.

    Raises:
        ValueError: If they are not.
        UserWarning: If another backend computed them.
    """
    results = []
    for make in (truth, contender[0]):
        leaves = [t.detach().requires_grad_() for t in contender[1]]
        with warnings.catch_warnings():
            # A backend that hands a call on to another one is no peer either.
            warnings.filterwarnings("error", message=".* runs what ")
            out = make(*leaves)
        made = torch.Generator(out.device).manual_seed(1)
        weight = torch.randn(out.shape, generator=made, device=out.device, dtype=out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
    for what, a, b in zip(("output", "dQ", "dK", "dV"), *results, strict=True):
        # What is NaN is apart, too.
        apart = float((b - a).norm(dtype=torch.float32) / a.norm(dtype=torch.float32))
        if not apart <= APART:
            raise ValueError(f"its {what} is off by {apart:.2g}")
    return contender
