"""Correctness and time of the Triton kernels of linear, causal linear and agent attention on a real GPU.

    python3 -m scripts.check.products_gpu [--jobs 12] [--only linear causal] [--no-times] [--out FILE]

First every dtype and several head dims against float64, outputs poisoned with NaN, twice (bit-equal); then medians of
CUDA events next to torch's forms of the same. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import elu, scaled_dot_product_attention

from scripts.bench.gpu import forward_and_backward, median_ms
from scripts.gpu_common import go_on, itself, versions
from visattn import Layout
from visattn.files import write_json
from visattn.kernels.agent.attention import pool_queries, through_agents
from visattn.kernels.linear.causal import causal_attention, decay_rates
from visattn.kernels.linear.features import elu_plus_one
from visattn.kernels.triton.agent.attention import agent_attention
from visattn.kernels.triton.linear.attention import linear_attention
from visattn.kernels.triton.linear.causal.attention import causal_linear_attention
from visattn.patterns import Agent, Linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT = {"fp32": 2e-5, "bf16": 1.5e-2, "fp16": 3e-3}
PHI = {"elu": lambda x: elu(x) + 1, "relu": torch.relu, "given": lambda x: x}
HEADS, DIM = 24, 128
KINDS = ("linear", "causal", "agent")


def linear_form(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, feature: str
) -> torch.Tensor:
    """Linear attention in torch, in the dtype given."""
    phi_q, phi_k = PHI[feature](q), PHI[feature](k)
    if mask is not None:
        phi_k = phi_k * mask[:, :, None, None]
    group = q.shape[2] // k.shape[2]
    phi_k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (phi_k, v))
    phi_q = phi_q.transpose(1, 2)
    total = phi_q @ phi_k.sum(2)[..., None]
    return (phi_q @ (phi_k.transpose(2, 3) @ v) / torch.where(total == 0, 1, total)).transpose(1, 2)


def agent_form(
    q: torch.Tensor, agents: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Agent attention in torch, in the dtype given."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", agents, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    gathered = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(), v)
    weights = (torch.einsum("bihd,bjhd->bhij", q, agents) * scale).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, gathered)


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=made, device="cuda", dtype=torch.float64).to(dtype)


def results(run: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of a random loss."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    weight = random(*out.shape, seed=9, dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def check(
    name: str, ours: Callable[..., Any], truth: Callable[..., Any], inputs: list[torch.Tensor], dtype: str
) -> bool:
    """Whether results are right and the same twice; prints their errors."""
    first, second = results(ours, inputs), results(ours, inputs)
    right = results(truth, [t.double() for t in inputs])
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(first, right, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    # The backward of agent attention is that of torch's attention, which does not promise the same bits twice.
    good = all(e <= LIMIT[dtype] for e in errors) and all(same if name.startswith("linear") else same[:1])
    twice = "" if all(same) else f", differs between two runs: {same}"
    print(f"{'ok' if good else 'WRONG':<6}{name}: {' '.join(f'{e:.1e}' for e in errors)}{twice}", flush=True)
    return good


Case = Callable[[], bool]


def linear_cases() -> Iterator[Case]:
    """Every feature, dtype and several sizes, grouped heads and a mask."""
    sizes = (("elu", 32, 32), ("relu", 64, 64), ("elu", 72, 72), ("elu", 128, 128), ("given", 256, 256))
    for dtype, (feature, f, d) in itertools.product(DTYPES, sizes):
        yield lambda dtype=dtype, feature=feature, f=f, d=d: linear_case(dtype, feature, f, d)


def linear_case(dtype: str, feature: str, f: int, d: int) -> bool:
    """One of them."""
    shapes = ((4, f), (2, f), (2, d))
    q, k, v = (random(2, 2501, *shape, seed=i, dtype=DTYPES[dtype]) for i, shape in enumerate(shapes))
    if feature == "given":
        q, k = q.float().softmax(-1).to(q.dtype), k.float().softmax(-1).to(k.dtype)
    mask = some(2501)
    ours = lambda q, k, v: linear_attention(q, k, v, mask, feature)  # noqa: E731
    truth = lambda q, k, v: linear_form(q, k, v, mask, feature)  # noqa: E731
    return check(f"linear {feature} {dtype} F {f} D {d}", ours, truth, [q, k, v], dtype)


def causal_cases() -> Iterator[Case]:
    """Single tokens in chunks with products, positions of many tokens without, each axis, text, grouped heads, a mask.

    The sizes of `linear_cases`, so that every launch is run.
    """
    layouts = ((Layout((1501,)), 0), (Layout((20, 11, 7), 33, 5), 1), (Layout((4, 15, 21), 17), 0))
    sizes = (("elu", 32, 32), ("relu", 64, 64), ("elu", 72, 72), ("elu", 128, 128), ("given", 256, 256))
    for dtype, (i, (feature, f, d)) in itertools.product(DTYPES, enumerate(sizes)):
        for j, (layout, axis) in enumerate(layouts):
            decay = (0.0, "heads", 0.3)[(i + j) % 3]
            yield lambda dtype=dtype, feature=feature, f=f, d=d, layout=layout, axis=axis, decay=decay: causal_case(
                dtype, feature, f, d, layout, axis, decay
            )


def causal_case(dtype: str, feature: str, f: int, d: int, layout: Layout, axis: int, decay: float | str) -> bool:
    """One of them."""
    shapes = ((4, f), (2, f), (2, d))
    q, k, v = (random(2, layout.length, *shape, seed=i, dtype=DTYPES[dtype]) for i, shape in enumerate(shapes))
    if feature == "given":
        q, k = q.float().softmax(-1).to(q.dtype), k.float().softmax(-1).to(k.dtype)
    mask = some(layout.length)
    pattern = Linear("elu" if feature == "given" else feature, tuple(i == axis for i in range(layout.dims)), decay)
    rates = decay_rates(pattern, 4, q.new_empty(0, dtype=torch.float32)) if decay else None
    ours = lambda q, k, v: causal_linear_attention(q, k, v, layout, axis, rates, mask, feature)  # noqa: E731
    truth = lambda q, k, v: causal_form(q, k, v, mask, feature, pattern, layout)  # noqa: E731
    name = f"linear causal {feature} {dtype} F {f} D {d} on {layout}, axis {axis}, decay {decay}"
    return check(name, ours, truth, [q, k, v], dtype)


def causal_form(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    feature: str,
    pattern: Linear,
    layout: Layout,
) -> torch.Tensor:
    """The same in torch, by its tiles, in float32 at least."""
    maps = {**PHI, "elu": elu_plus_one}
    phi_q, phi_k = maps[feature](q), maps[feature](k)
    if mask is not None:
        phi_k = phi_k * mask[:, :, None, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    return causal_attention(phi_q.to(wide), phi_k.to(wide), v, pattern, layout)


def agent_cases() -> Iterator[Case]:
    """Every dtype and several head dims, grouped heads, few and many agents, with and without a mask."""
    sizes = ((32, 49, True), (64, 49, False), (72, 100, True), (128, 256, False), (128, 9, True))
    for dtype, (dim, agents, masked) in itertools.product(DTYPES, sizes):
        yield lambda dtype=dtype, dim=dim, agents=agents, masked=masked: agent_case(dtype, dim, agents, masked)


def agent_case(dtype: str, dim: int, agents: int, masked: bool) -> bool:
    """One of them."""
    shapes = ((3001, 4), (agents, 4), (3001, 2), (3001, 2))
    inputs = [random(2, *shape, dim, seed=i, dtype=DTYPES[dtype]) for i, shape in enumerate(shapes)]
    mask = some(3001) if masked else None
    ours = lambda q, agents, k, v: agent_attention(q, agents, k, v, mask, None, dim**-0.5, through_agents)  # noqa: E731
    truth = lambda q, agents, k, v: agent_form(q, agents, k, v, mask, dim**-0.5)  # noqa: E731
    return check(f"agent {dtype} D {dim}, {agents} agents{', mask' * masked}", ours, truth, inputs, dtype)


def some(tokens: int) -> torch.Tensor:
    """A key mask of two samples."""
    return torch.rand(2, tokens, device="cuda", generator=torch.Generator("cuda").manual_seed(5)) > 0.3


def linear_times(side: int) -> dict[str, Any]:
    """Forward and backward next to torch's form, compiled and not, and to dense attention."""
    inputs = [random(1, side * side, HEADS, DIM, seed=i, dtype=torch.bfloat16) for i in range(3)]
    forms = {
        "triton": lambda q, k, v: linear_attention(q, k, v, None, "elu"),
        "torch": lambda q, k, v: linear_form(q, k, v, None, "elu"),
        "torch compiled": torch.compile(lambda q, k, v: linear_form(q, k, v, None, "elu")),
    }
    found: dict[str, Any] = {name: forward_and_backward(form, inputs) for name, form in forms.items()}
    found["dense"] = dense_times(inputs)
    return found


def causal_times(layout: Layout) -> dict[str, Any]:
    """Forward and backward next to torch's form and to dense attention, which sees later positions too."""
    inputs = [random(1, layout.length, HEADS, DIM, seed=i, dtype=torch.bfloat16) for i in range(3)]
    pattern = Linear("elu", (True, *[False] * (layout.dims - 1)), "heads")
    rates = decay_rates(pattern, HEADS, inputs[0].new_empty(0, dtype=torch.float32))
    forms = {
        "triton": lambda q, k, v: causal_linear_attention(q, k, v, layout, 0, rates),
        "torch": lambda q, k, v: causal_form(q, k, v, None, "elu", pattern, layout),
    }
    found: dict[str, Any] = {name: forward_and_backward(form, inputs) for name, form in forms.items()}
    found["dense"] = dense_times(inputs)
    return found


def agent_times(side: int, agents: int) -> dict[str, Any]:
    """Pooling, both halves and the whole by our kernels and by torch's attention."""
    pattern, layout = Agent(agents=(agents, agents)), Layout((side, side))
    q, k, v = (random(1, side * side, HEADS, DIM, seed=i, dtype=torch.bfloat16) for i in range(3))
    pooled, _ = pool_queries(q, pattern, layout)
    scale = DIM**-0.5
    found: dict[str, Any] = {"pool": forward_and_backward(lambda t: pool_queries(t, pattern, layout)[0], [q])}
    found["triton"] = forward_and_backward(
        lambda q, agents, k, v: agent_attention(q, agents, k, v, None, None, scale, through_agents), [q, pooled, k, v]
    )
    mask = torch.ones(1, side * side, dtype=torch.bool, device="cuda")
    found["triton, mask"] = forward_and_backward(
        lambda q, agents, k, v: agent_attention(q, agents, k, v, mask, None, scale, through_agents), [q, pooled, k, v]
    )
    found["sdpa, mask"] = forward_and_backward(
        lambda q, agents, k, v: through_agents(q, agents, k, v, mask, None, scale), [q, pooled, k, v]
    )
    kinds = {"sdpa": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, kind in kinds.items():
        try:
            if kind is None:
                found[name] = forward_and_backward(
                    lambda q, agents, k, v: through_agents(q, agents, k, v, None, None, scale), [q, pooled, k, v]
                )
                continue
            with sdpa_kernel(kind):
                found[name] = forward_and_backward(
                    lambda q, agents, k, v: through_agents(q, agents, k, v, None, None, scale), [q, pooled, k, v]
                )
                found[f"{name} gather"] = forward_and_backward(half, [pooled, k, v])
                found[f"{name} read"] = forward_and_backward(half, [q, pooled, pooled])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found


def half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One of the two attentions."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def dense_times(inputs: list[torch.Tensor]) -> dict[str, float]:
    """Forward of dense attention."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
        return {"forward_ms": median_ms(lambda: half(*inputs), 0.2)}


def main() -> int:
    """Check in several processes if asked (most of the time goes into compiling), then time in this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS), help="some of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that check; 0 checks nothing")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; what it has of other problems is kept")
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    wrong = 0
    if chosen.jobs > 1:
        command = itself("--no-times", "--only", *chosen.only)
        running = [subprocess.Popen([*command, "--shard", f"{i}/{chosen.jobs}"]) for i in range(chosen.jobs)]
        wrong = sum(p.wait() for p in running)
    elif chosen.jobs:
        wrong = checks(chosen.only, *map(int, chosen.shard.split("/")))
    if not chosen.no_times:
        report: dict[str, Any] = {"versions": versions(), "heads": HEADS, "dim": DIM, "dtype": "bfloat16", "times": {}}
        go_on(report, chosen.out, "times")
        report_times(chosen.only, report, chosen.out)
    return int(wrong > 0)


def checks(only: list[str], shard: int, of: int) -> int:
    """How many cases of a shard are wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    made = {"linear": linear_cases, "causal": causal_cases, "agent": agent_cases}
    cases = [case for kind in only for case in made[kind]()]
    wrong = sum(not case() for case in cases[shard::of])
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    return wrong


def timed(only: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What measures the times of each problem."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for side in (128, 256):
        if "linear" in only:
            found[f"linear {side}x{side}"] = partial(linear_times, side)
        if "agent" in only:
            for agents in (7, 16):
                found[f"agent {agents}x{agents} on {side}x{side}"] = partial(agent_times, side, agents)
    if "causal" in only:
        # Frames of many tokens, a sequence of single ones, and rows of an image.
        for layout in (Layout((21, 45, 80)), Layout((65536,)), Layout((128, 128))):
            found[f"causal {layout}"] = partial(causal_times, layout)
    return found


def report_times(only: list[str], report: dict[str, Any], out: Path | None) -> None:
    """All times, printed and written when each problem is done."""
    for name, measure in timed(only).items():
        rows = report["times"][name] = measure()
        if out is not None:
            write_json(out, report)
        for who, row in rows.items():
            cells = (f"{key} {value:.3f}" if key != "error" else value for key, value in row.items())
            print(f"{name:<24}{who:<16}" + "  ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
