"""Correctness of every Triton kernel on a real GPU.

    python3 -m scripts.check.lists_gpu [--jobs 8] [--only TEXT] [--whole] [--one-pass]

Forward, with and without gradients, and gradients against the float64 reference on shapes with many tiles, outputs
poisoned with NaN, every call twice (bit-equal), head dims 32 to 256, three dtypes. `--whole` takes the Hopper kernels
without lists by halves, as they run for lists that are made at run time, `--one-pass` their backward in one pass. Exit
status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from typing import Any

import torch

from scripts.gpu_common import itself, versions
from visattn import Layout, attention, parse
from visattn.kernels.triton.config import HOPPER, ONE_PASS
from visattn.patterns import BiasedPattern, HeadsPattern, RoutedPattern

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative error of forward and gradients: rounding of inputs, probabilities and outputs.
LIMIT = {"fp32": 2e-5, "bf16": 1.5e-2, "fp16": 2e-3}
HEAD_DIMS = (32, 40, 64, 72, 96, 128, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        pattern: Text of the pattern.
        layout: The tokens.
        dtype: Name of the dtype.
        dim: Head dim.
        kv_heads: Of 4 heads.
        mask: Whether a third of the keys is masked out.
        rpb: Whether a relative position bias is added.
        heads_first: Whether inputs are views of [B, H, S, D].
    """

    pattern: str
    layout: Layout
    dtype: str = "bf16"
    dim: int = 64
    kv_heads: int = 4
    mask: bool = False
    rpb: bool = False
    heads_first: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("mask", "rpb", "heads_first") if getattr(self, name)]
        text = f"{self.pattern} on {self.layout}, {self.dtype}, D {self.dim}, kv {self.kv_heads}"
        return ", ".join([text, *flags])


def cases() -> list[Case]:
    """Every head dim and dtype on one joint problem, every pattern and feature in two dtypes."""
    joint = Layout((30, 37), prefix=7, suffix=77)
    pairs = [(dim, dtype) for dim in HEAD_DIMS for dtype in DTYPES if dim <= 128 or dtype != "fp32"]
    found = [Case("na(window=13x13)", joint, dtype, dim, kv_heads=2, mask=True) for dim, dtype in pairs]
    # These run on Hopper's own kernels there.
    for dim, dtype in ((64, "bf16"), (64, "fp16"), (128, "bf16"), (128, "fp16")):
        found += [Case("na(window=13x13)", joint, dtype, dim, 2, heads_first=first) for first in (False, True)]
        found += [
            Case("clear(radius=9,pool=4)", Layout((38, 41), suffix=300), dtype, dim, mask=m) for m in (False, True)
        ]
        found += [Case("na(window=9x9)", joint, dtype, dim, mask=True, heads_first=True)]
        found += [Case("na(window=5x9x9,causal=true)", Layout((7, 20, 13)), dtype, dim)]
        found += [Case("radial(decay=0.5)", Layout((8, 16, 16)), dtype, dim), Case("dense", Layout(1536), dtype, dim)]
        # Halves of row tiles see different tiles.
        found += [Case("na(window=16x16,stride=8x8)", Layout((64, 56), 70), dtype, dim, 4, m) for m in (False, True)]
        found += [Case("clear(radius=16)", Layout((70, 64)), dtype, dim), Case("na(window=24x24)", joint, dtype, dim)]
    # These have fewer channels than the kernels compute with.
    for dim, dtype in ((40, "bf16"), (80, "bf16"), (72, "fp16")):
        found += [Case("na(window=13x13)", joint, dtype, dim, heads_first=first) for first in (False, True)]
        found += [Case("clear(radius=9,pool=4)", Layout((38, 41), suffix=300), dtype, dim, mask=True)]
        found += [Case("dense", Layout(1536), dtype, dim)]
        found += [Case("topk(keep=5,block=8x16,key_block=8x8)", Layout((45, 70), prefix=7, suffix=130), dtype, dim, 2)]
        found += [Case("na(window=9x9)", Layout((36, 40), 1, 0, Layout((18, 20), 0, 77)), dtype, dim, mask=True)]
    for dtype, dim in (("bf16", 128), ("fp32", 64)):
        found += [
            Case("dense", Layout(1500, prefix=5), dtype, dim),
            Case("na(window=13x13,stride=4x4)", Layout((48, 40)), dtype, dim, heads_first=True),
            Case("na(window=5x9x9,stride=2x4x4)", Layout((7, 20, 13), suffix=50), dtype, dim),
            Case("na(window=7x7,dilation=2)", Layout((40, 33), prefix=1), dtype, dim, rpb=True),
            Case("na(window=9,causal=true)", Layout(1333), dtype, dim, rpb=True, mask=True),
            Case("clear(radius=9,pool=4)", Layout((38, 41), suffix=33), dtype, dim, mask=True),
            Case("halo(block=7x7,halo=3)", Layout((35, 42)), dtype, dim),
            Case("radial(decay=0.2)", Layout((6, 15, 20), prefix=20), dtype, dim),
            Case("routing(regions=7x7,topk=4)", Layout((35, 38), prefix=3), dtype, dim, kv_heads=1),
            Case("routing(regions=4x4,topk=3)", Layout((16, 16)), dtype, dim),
            Case("topk(keep=0.2,block=8x8)", Layout((40, 48), prefix=7), dtype, dim, kv_heads=2),
            Case("topp(p=0.6,block=8x8)", Layout((35, 38), prefix=3, suffix=50), dtype, dim, kv_heads=1, mask=True),
            Case("above(tau=0.5,block=128,key_block=64)", Layout(1333), dtype, dim, heads_first=True),
            Case("topk(keep=0.1,block=8x8,per=head,always=none)", Layout((40, 48)), dtype, dim),
            # Query or key blocks of 128 tokens run on Hopper's own kernels there.
            Case("topk(keep=0.2,block=8x16)", Layout((48, 64)), dtype, dim, heads_first=True),
            Case("topk(keep=5,block=8x16,key_block=8x8)", Layout((45, 70), prefix=7, suffix=130), dtype, dim, 2),
            Case("topp(p=0.5,block=8x16,key_block=8x8)", Layout((45, 70), prefix=3), dtype, dim, 1, mask=True),
            Case("above(tau=0.8,block=4x4x8,always=none)", Layout((9, 14, 20), suffix=5), dtype, dim),
            Case("topk(keep=4,block=8x16,key_block=8x8,rest=mean)", Layout((45, 70), prefix=7), dtype, dim, 2),
            Case("above(tau=0.8,block=8x8,rest=mean)", Layout((45, 70), suffix=30), dtype, dim, mask=True),
            Case("topk(keep=4,block=8x16,key_block=8x8,rest=slope)", Layout((45, 70), prefix=7), dtype, dim, 2),
            Case("above(tau=0.8,block=8x8,key_block=2x4,rest=slope)", Layout((45, 70), 0, 30), dtype, dim, mask=True),
            # Steps of several small key tiles.
            Case("topk(keep=0.2,block=8x8,key_block=4x4)", Layout((35, 38), prefix=3), dtype, dim, 2),
            Case("topp(p=0.6,block=4x4x4,key_block=2x2x2)", Layout((9, 14, 20), suffix=5), dtype, dim, mask=True),
            Case("topk(keep=0.2,block=1x1,key_block=8x8)", Layout((35, 38), prefix=7), dtype, dim, 2, mask=True),
            Case("topp(p=0.3,of=height,block=1x2,key_block=4x16)", Layout((48, 64), suffix=30), dtype, dim),
            Case("topk(keep=2,block=64,key_block=256,per=head,always=none)", Layout(3333), dtype, dim, mask=True),
            Case("topk(keep=0.2,block=64,causal=true)", Layout(1333, 7, 50), dtype, dim, 2, mask=True),
            Case("topp(p=0.6,block=128,key_block=64,causal=true)", Layout(1333), dtype, dim, heads_first=True),
            Case("topk(keep=3,block=1,key_block=64,causal=true)", Layout(1000, 7), dtype, dim, 2),
            Case("topk(keep=0.3,block=1x8x16,key_block=1x8x8,causal=1x0x0)", Layout((5, 24, 32), 7), dtype, dim),
        ]
    for dtype, dim in (("bf16", 64), ("fp16", 128), ("fp32", 64)):
        found += [
            Case("na(window=9x9)", Layout((36, 40), 1, 0, Layout((18, 20), 0, 77)), dtype, dim, mask=True),
            Case("na(window=8x8,stride=4x4)", Layout((32, 32), key_layout=Layout((64, 48))), dtype, dim, kv_heads=2),
            Case("clear(radius=6,pool=4)", Layout((38, 41), 0, 33, Layout((19, 41), 5)), dtype, dim),
            Case("halo(block=8x8,halo=2)", Layout((35, 42), key_layout=Layout((35, 21))), dtype, dim, heads_first=True),
            Case("dense", Layout((48, 48), 1, 0, Layout((7, 7), 1)), dtype, dim),
            Case("na(window=13x13,circular=0x1)", Layout((36, 72), 3), dtype, dim, mask=True),
            Case("na(window=9x9,dilation=2,circular=true)", Layout((40, 36)), dtype, dim),
            Case("clear(radius=9,circular=true)", Layout((38, 41), suffix=33), dtype, dim),
            Case("halo(block=8x8,halo=3,circular=0x1)", Layout((35, 42)), dtype, dim),
        ]
    return found


def forward(case: Case, inputs: list[torch.Tensor], backend: str, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Output and log-sum-exp."""
    rpb = inputs[3] if case.rpb else None
    q, k, v = inputs[:3]
    found = attention(q, k, v, case.pattern, case.layout, key_mask=mask, rpb=rpb, backend=backend, return_lse=True)
    return list(found)


def run(case: Case, inputs: list[torch.Tensor], backend: str, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = forward(case, leaves, backend, mask)
    made = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(out.shape, generator=made, device="cuda", dtype=torch.float64)
    loss = (out.double() * weight).sum() + lse.double().nan_to_num(neginf=0.0).square().mean()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def inputs_of(case: Case) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k, v and rpb, and the key mask."""
    made = torch.Generator("cuda").manual_seed(0)
    batch, keys = 2, case.layout.keys.length
    tensors = []
    for length, heads in ((case.layout.length, 4), (keys, case.kv_heads), (keys, case.kv_heads)):
        shape = (batch, heads, length, case.dim) if case.heads_first else (batch, length, heads, case.dim)
        x = torch.randn(shape, generator=made, device="cuda", dtype=torch.float64).to(DTYPES[case.dtype])
        tensors.append(x.transpose(1, 2) if case.heads_first else x)
    if case.rpb:
        pattern = parse(case.pattern)
        assert isinstance(pattern, BiasedPattern), f"{case.pattern} takes no bias"
        sides = pattern.rpb_shape(case.layout.grid)
        tensors.append(torch.randn((4, *sides), generator=made, device="cuda"))
    mask = torch.rand((batch, keys), generator=made, device="cuda") > 0.3 if case.mask else None
    if mask is not None:
        mask[1] = False  # a sample whose queries see nothing
    return tensors, mask


def check(case: Case, backend: str = "triton", repeats: bool = True) -> str:
    """What is wrong with a case, empty if nothing is; prints its errors.

    Args:
        case: The case.
        backend: Who runs it.
        repeats: Whether a second run must be equal bit for bit.
    """
    tensors, mask = inputs_of(case)
    ours = run(case, tensors, backend, mask)
    again = run(case, tensors, backend, mask) if repeats else list(ours)
    reference = attention_reference(case, tensors, mask)
    names = ["out", "lse", "dq", "dk", "dv", "drpb"][: len(ours)]
    # Without gradients calls go other ways, the second one along what the first one has left.
    with torch.no_grad():
        ours += forward(case, tensors, backend, mask)
        again += forward(case, tensors, backend, mask) if repeats else ours[-2:]
    names, reference = [*names, "out alone", "lse alone"], [*reference, *reference[:2]]
    problems, errors = [], []
    for name, a, b, truth in zip(names, ours, again, reference, strict=True):
        if not torch.equal(a, b):
            problems.append(f"{name} differs between two runs")
        finite = truth.isfinite()
        if not torch.equal(finite, a.isfinite()):
            problems.append(f"{name} is finite elsewhere than the reference")
        wrong = (a.double() - truth)[finite].norm() / truth[finite].norm().clamp(min=1e-30)
        errors.append(f"{name} {wrong:.1e}")
        if not wrong <= LIMIT[case.dtype]:
            problems.append(f"{name} is off by {wrong:.2e}")
    print(f"{'WRONG' if problems else 'ok':<6}{case}: {', '.join(errors)}", flush=True)
    return f"{case}: {'; '.join(problems)}" if problems else ""


def attention_reference(case: Case, tensors: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The reference on the same inputs in float64."""
    if isinstance(parse(case.pattern), HeadsPattern):
        return run(case, [t.double() for t in tensors], "heads", mask)
    if not isinstance(parse(case.pattern), RoutedPattern):
        return run(case, [t.double() for t in tensors], "reference", mask)
    # The choice must be made from the same q and k: rounding could tip it.
    return [t.double() for t in run(case, [t.float() for t in tensors], "reference", mask)]


def main() -> int:
    """Check all cases, in several processes if asked: most of the time goes into compiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose text contains this")
    parser.add_argument("--whole", action="store_true", help="the Hopper kernels without lists by halves")
    parser.add_argument("--one-pass", action="store_true", help="the Hopper backward in one pass")
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.jobs > 1:
        given = (("--whole", chosen.whole), ("--one-pass", chosen.one_pass))
        flags = [flag for flag, on in given if on]
        command = itself("--only", chosen.only, *flags, "--shard")
        running = [subprocess.Popen([*command, f"{i}/{chosen.jobs}"]) for i in range(chosen.jobs)]
        return max(abs(p.wait()) for p in running)
    if chosen.one_pass:
        HOPPER["key_grad"].update(ONE_PASS)
    if chosen.whole:
        for configs in HOPPER.values():
            configs |= {dim: launch._replace(halves=False) for dim, launch in configs.items()}
    # Fills what torch.empty returns with NaN: a kernel that leaves a value unwritten is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False
    index, of = map(int, chosen.shard.split("/"))
    if index == 0:
        print(versions())
    picked = [c for c in cases() if chosen.only in str(c)][index::of]
    found = []
    for case in picked:
        try:
            found.append(check(case))
        except Exception as error:
            print(f"FAILED {case}: {type(error).__name__}: {str(error)[:400]}", flush=True)
            found.append(str(case))
    wrong = [f for f in found if f]
    print(f"shard {index}/{of}: {len(picked) - len(wrong)} of {len(picked)} cases right", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
