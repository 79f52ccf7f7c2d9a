"""Halo and Ulysses on GPUs against one GPU: outputs, gradients, bytes, and a diffusers model, over NCCL.

    torchrun --nproc-per-node 2 -m scripts.check.parallel_gpu

Every rank computes the whole sequence too and compares its slab; rank 0 prints a line for each case. Ends with status 1
if one is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from visattn import Layout, apply, attention, parallel

# Pattern, layout, axis that is cut.
CASES = (
    ("na(window=5x9x9)", Layout((8, 32, 32)), 2),
    ("na(window=5x9x9, dilation=1x2x1)", Layout((8, 32, 33), prefix=77), 1),
    ("na(window=16x16, stride=8x8)", Layout((64, 64), prefix=128), 0),
    ("na(window=9x9, causal=1x0)", Layout((48, 64), suffix=60), 0),
    ("clear(radius=8)", Layout((64, 63), prefix=100), 1),
    ("halo(block=8x8, halo=4, circular=0x1)", Layout((64, 64)), 1),
    ("radial(decay=0.5)", Layout((9, 24, 24), prefix=64), 0),
    ("dense", Layout((40, 48), prefix=32), 0),
)
WAYS: dict[str, Any] = {"halo": parallel.halo_attention, "ulysses": parallel.ulysses_attention}
BF16, FP32 = torch.bfloat16, torch.float32
# Share of the norm: rounding of the outputs of parts, and of gradients, in each dtype.
LARGEST = {BF16: 2e-2, FP32: 2e-5}


def wrong(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance as a share of the norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def errors(how: str, pattern: str, layout: Layout, axis: int, dtype: torch.dtype, place: Any) -> dict[str, float]:
    """Errors of this rank's output and gradients."""
    slabs = parallel.Slabs.even(layout, place.world, axis)
    made = torch.Generator("cuda").manual_seed(0)
    whole = [torch.randn(2, layout.length, 4, 64, device="cuda", generator=made).to(dtype) for _ in range(4)]
    q, k, v = (t.clone().requires_grad_() for t in whole[:3])
    out = attention(q, k, v, pattern, layout)
    out.backward(whole[3])
    own = [slabs.shard(t, place.rank).clone().requires_grad_() for t in whole[:3]]
    found = WAYS[how](*own, pattern, slabs)
    local = slabs.local(place.rank)
    share = torch.full((local.length, 1, 1), 1 / place.world, device="cuda")
    share[local.prefix : local.prefix + local.tokens] = 1
    found.backward((slabs.shard(whole[3], place.rank) * share).to(dtype))
    result = {"out": wrong(found.detach(), slabs.shard(out.detach(), place.rank))}
    for name, mine, theirs in zip("qkv", own, (q, k, v), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        # Of dense tokens the ranks' gradients add up.
        inside = slice(local.prefix, local.prefix + local.tokens)
        result[name] = wrong(mine.grad[:, inside], slabs.shard(theirs.grad, place.rank)[:, inside])
    return result


def model_errors(how: str, compiled: bool) -> float:
    """Error of a small Wan's output, with blocks compiled in one graph or as they are."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 3, "ffn_dim": 512}
    model: Any = WanTransformer3DModel(**sizes, text_dim=64, freq_dim=64)
    model = model.to("cuda", BF16).eval()
    x = torch.randn(1, 16, 9, 48, 80, device="cuda", dtype=BF16)
    text, step = torch.randn(1, 20, 64, device="cuda", dtype=BF16), torch.full((1,), 500, device="cuda")
    given = {"hidden_states": x, "timestep": step, "encoder_hidden_states": text, "return_dict": False}
    outs = []
    for parallel_way in (None, how):
        if parallel_way and compiled:
            model.compile_repeated_blocks(fullgraph=True)
        with torch.no_grad(), apply(model, "na(window=5x9x9)", strict=True, parallel=parallel_way):
            outs.append(model(**given)[0])
    return wrong(outs[1], outs[0])


def cases(place: Any) -> Iterator[tuple[str, float, Callable[[], dict[str, float]]]]:
    """Name, largest error and what finds the errors, of each case."""
    for how in WAYS:
        if importlib.util.find_spec("diffusers") is not None:
            for compiled in (True, False):
                name = f"{how} WanTransformer3DModel{', blocks compiled' * compiled}"
                yield name, 3e-2, lambda how=how, compiled=compiled: {"model": model_errors(how, compiled)}
        for pattern, layout, axis in CASES:
            for dtype, largest in LARGEST.items():
                given = how, pattern, layout, axis, dtype, place
                yield f"{how} {pattern} on {layout} {dtype}", largest, partial(errors, *given)


def main() -> int:
    """Run the cases until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no case begins")
    options = parser.parse_args()
    began, failed, left = time.monotonic(), 0, 0
    with parallel.together("cuda", timeout=120) as place:
        for name, largest, find in cases(place):
            late = torch.tensor(time.monotonic() - began > options.budget, device=place.device, dtype=torch.int32)
            dist.broadcast(late, 0)
            if options.only not in name or late:
                left += options.only in name
                continue
            failed += _say(name, find(), largest, place)
        total = torch.tensor(failed, device=place.device)
        dist.all_reduce(total)
        if place.first:
            print(
                f"{left} cases left\n" * (left > 0) + ("all right" if not total else f"{int(total)} wrong"), flush=True
            )
        failed = int(total)
    return int(failed > 0)


def _say(case: str, found: dict[str, float], largest: float, place: Any) -> bool:
    bad = not all(error <= largest for error in found.values())
    if place.first or bad:
        text = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
        print(f"{'WRONG' if bad else 'right'} rank {place.rank}: {case}: {text}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
