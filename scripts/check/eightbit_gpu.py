"""Correctness of the forward in 8 bits on a real GPU.

    python3 -m scripts.check.eightbit_gpu [--budget 100] [--only TEXT]

Both precisions on the kernels that each GPU takes, Hopper's own and the general one, against the float64 reference:
the error has to be what rounding to 8 bits makes, outputs are poisoned with NaN, every call runs twice on other memory
(bit-equal). Keys and values have means, which a wrong shift would show. Rounding of the output to its own dtype is
allowed for, and printed: values' mean alone gives bf16 as much of that as 8 bits give where the mean is thrice the
spread.

A case that is off says where: by sample and head, part of the tokens and channel, the worst tokens, and which scale
of the output would fit best. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any, NamedTuple

import torch

from scripts.gpu_common import versions
from visattn import Layout, attention, clear_caches, parse
from visattn.kernels.triton import backend as engine
from visattn.kernels.triton.eightbit.run import attend_8bit
from visattn.patterns import RoutedPattern
from visattn.problem import PRECISIONS, Call

# Relative error of the output without its mean over the tokens: rounding of q, k, v and weights, but not of the output.
LIMIT = {"int8": 0.03, "fp8": 0.055}
LSE_LIMIT = 0.05
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
JOINT = Layout((30, 37), prefix=7, suffix=77)


class Case(NamedTuple):
    """One problem; `general` leaves Hopper's own kernel out."""

    pattern: str
    layout: Layout
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 4
    mask: bool = False
    general: bool = False


CASES = [
    Case("na(window=16x16,stride=8x8)", Layout((64, 64))),
    Case("na(window=13x13)", JOINT, kv_heads=2),
    Case("dense", Layout(1536)),
    Case("na(window=16x16,stride=8x8)", Layout((64, 64)), dtype=torch.float16),
    Case("dense", Layout(1536), dtype=torch.float16),
    Case("na(window=13x13)", JOINT, 64),
    Case("na(window=16x16,stride=8x8)", Layout((64, 64)), 64),
    Case("clear(radius=9)", Layout((38, 41), suffix=300)),
    Case("clear(radius=9,pool=4)", Layout((38, 41), suffix=33), dtype=torch.float16),
    Case("topk(keep=0.2,block=8x16)", Layout((48, 64))),
    Case("topk(keep=5,block=8x16,key_block=8x8)", Layout((45, 70), prefix=7, suffix=130), 64, kv_heads=2),
    Case("na(window=5x9x9,causal=true)", Layout((7, 20, 13))),
    Case("na(window=9x9)", Layout((36, 40), prefix=1, key_layout=Layout((18, 20), suffix=77))),
    Case("na(window=13x13)", JOINT, general=True),
    Case("na(window=16x16,stride=8x8)", Layout((64, 64)), general=True),
    Case("na(window=13x13)", JOINT, 72, mask=True),
    Case("na(window=7x7,dilation=2)", Layout((40, 33), prefix=1), 64, torch.float32),
    Case("routing(regions=7x7,topk=4)", Layout((35, 38), prefix=3), 64, kv_heads=1),
    Case("topk(keep=0.2,block=8x8)", Layout((40, 48), prefix=7), 40, torch.float16, 2),
]


def inputs_of(case: Case) -> tuple[Tensors, torch.Tensor | None]:
    """q, k and v with means in keys and values, and the key mask."""
    made = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, device="cuda")

    length = case.layout.keys.length
    q = normal(2, case.layout.length, 4, case.dim)
    k = normal(2, length, case.kv_heads, case.dim) + 2 * normal(2, 1, case.kv_heads, case.dim)
    mean = 0.25 if case.dtype == torch.bfloat16 else 3
    v = normal(2, length, case.kv_heads, case.dim) + mean * normal(2, 1, case.kv_heads, case.dim)
    mask = torch.rand((2, length), generator=made, device="cuda") > 0.3 if case.mask else None
    if mask is not None:
        mask[1] = False  # a sample whose queries see nothing
    return (q.to(case.dtype), k.to(case.dtype), v.to(case.dtype)), mask


def run(case: Case, inputs: Tensors, mask: torch.Tensor | None, precision: str) -> Any:
    """Output and log-sum-exp."""
    q, k, v = inputs
    if not case.general:
        options: dict[str, Any] = {"key_mask": mask, "precision": precision, "return_lse": True}
        return attention(q, k, v, case.pattern, case.layout, backend="triton", **options)
    call = Call(parse(case.pattern), case.layout, case.dim**-0.5, mask, lse=True, precision=precision)
    return attend_8bit(q, k, v, call, 89)


def where(ours: torch.Tensor, truth: torch.Tensor, layout: Layout) -> str:
    """Relative errors by sample and head, by part of the tokens and by channel, and the best scale of our output."""
    middle = truth.mean(1, keepdim=True)
    off, spread = (ours - truth).square(), (truth - middle).square()

    def by(*dims: int, tokens: slice = slice(None)) -> str:
        ratio = off[:, tokens].sum(dims) / spread[:, tokens].sum(dims)
        return " ".join(f"{each:.3f}" for each in ratio.sqrt().flatten().tolist())

    grid = layout.prefix + layout.tokens
    parts = {
        "prefix": slice(0, layout.prefix),
        "grid": slice(layout.prefix, grid),
        "suffix": slice(grid, layout.length),
    }
    tokens = {name: by(0, 1, 2, 3, tokens=part) for name, part in parts.items() if part.stop > part.start}
    rows = (off.sum((0, 2, 3)) / spread.sum((0, 2, 3))).sqrt()
    worst = rows.topk(min(6, len(rows)))
    scale = float(((ours - middle) * (truth - middle)).sum() / spread.sum())
    bias = float((ours - truth).mean((0, 1)).abs().max())
    return (
        f"by sample and head {by(1, 3)}; by part {tokens}; first channels {by(0, 1, 2).split()[:8]}; worst tokens "
        f"{worst.indices.tolist()} {[round(x, 3) for x in worst.values.tolist()]}, median {float(rows.median()):.3f}; "
        f"best scale {scale:.4f}, largest mean error {bias:.2e}"
    )


def check(case: Case, precision: str) -> str:
    """What is wrong with a case, empty if nothing is; prints its errors."""
    inputs, mask = inputs_of(case)
    ours = run(case, inputs, mask, precision)
    # Kept launches get other addresses, behind which the first ones hold nothing any more.
    q, k, v = (t.clone() for t in inputs)
    for t in inputs:
        t.fill_(float("nan"))
    inputs, mask = (q, k, v), None if mask is None else mask.clone()
    again = run(case, inputs, mask, precision)
    # Other values choose other lists, which no kept launch may have from an earlier call.
    other = (q.flip(1), k.flip(1), v.flip(1))
    third = run(case, other, mask, precision)
    clear_caches()
    fresh = run(case, other, mask, precision)
    # A choice must be made from the same q and k: rounding could tip it.
    dtype = torch.float32 if isinstance(parse(case.pattern), RoutedPattern) else torch.float64
    q, k, v = (t.to(dtype) for t in inputs)
    options: dict[str, Any] = {"key_mask": mask, "backend": "reference", "return_lse": True}
    truth, lse = attention(q, k, v, case.pattern, case.layout, **options)
    problems = [f"{name} differs between two runs" for name, a, b in zip(("out", "lse"), ours, again, strict=True)
                if not torch.equal(a, b)]  # fmt: skip
    problems += [f"{name} of other values differs from a first call's" for name, a, b in zip(
        ("out", "lse"), third, fresh, strict=True) if not torch.equal(a, b)]  # fmt: skip
    spread = (truth - truth.mean(1, keepdim=True)).norm()
    error = float((ours[0].double() - truth).norm() / spread)
    own = float((truth.to(case.dtype).to(truth.dtype) - truth).norm() / spread)
    seen = lse.isfinite()
    if not torch.equal(seen, ours[1].isfinite()) or not ours[0].isfinite().all():
        problems.append("it is finite elsewhere than the reference")
    lse_error = float((ours[1].double() - lse)[seen].abs().max())
    if not error <= math.hypot(LIMIT[precision], own):
        problems.append(f"out is off by {error:.3f}: {where(ours[0].double(), truth.double(), case.layout)}")
    if not lse_error <= LSE_LIMIT:
        problems.append(f"lse is off by {lse_error:.3f}")
    text = f"{precision} {case.pattern} on {case.layout}, D {case.dim}, {case.dtype}, kv {case.kv_heads}"
    text += (
        f"{', mask' * case.mask}{', general' * case.general}: out {error:.4f} (dtype's {own:.4f}), lse {lse_error:.4f}"
    )
    print("WRONG" if problems else "ok   ", text, *problems, sep="; " if problems else " ", flush=True)
    return "; ".join(problems)


def main() -> int:
    """Check all cases within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=100, help="seconds")
    parser.add_argument("--only", default="", help="cases whose text contains this")
    chosen = parser.parse_args()
    deterministic: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    print(versions(), "compute capability", engine.architecture(), flush=True)
    begin, wrong, done = time.monotonic(), 0, 0
    for case in CASES:
        for precision in PRECISIONS:
            if chosen.only not in str(case) or time.monotonic() - begin > chosen.budget:
                continue
            try:
                wrong += bool(check(case, precision))
            except Exception as error:
                wrong += 1
                print(f"FAILED {precision} {case}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            done += 1
    print(f"{done - wrong} of {done} right, {time.monotonic() - begin:.0f} s; {len(CASES) * len(PRECISIONS)} in all")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
