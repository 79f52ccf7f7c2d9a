"""Do the kernels that choose for dynamic patterns choose what torch's operators choose, and how long do both take?

    python -m scripts.check.choosing_gpu

Whole numbers, whose means (of 1, 2, 4, ... tokens: no border leaves another number) and products are exact, must give
equal lists, ties included; where exponentials are taken, all but 1 in a million. Noise may tip pairs of blocks whose
scores differ by rounding: at most 1 in 10,000 entries. Choices are made twice and must be equal. Exit status 1 if
anything is off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from scripts.bench.gpu import in_turns
from scripts.gpu_common import versions
from visattn import Layout, parse
from visattn.kernels.triton.choosing import choose
from visattn.kernels.triton.choosing.choose import chosen
from visattn.patterns import DynamicPattern
from visattn.patterns.choice.blocks import inner

ALLOWED = 1e-4
# Whole numbers or noise; whether some tokens take no part.
VARIANTS = ((True, False), (False, False), (False, True))
CASES: dict[str, tuple[str, Layout]] = {
    "topk": ("topk(keep=0.1)", Layout((256, 256))),
    "topk, 128 x 64": ("topk(keep=0.1,block=8x16,key_block=8x8)", Layout((256, 256), 512)),
    "topk, video": ("topk(keep=0.1,block=4x4x8,key_block=4x4x4)", Layout((30, 45, 88), suffix=20)),
    "topk, parts": ("topk(keep=0.1,score=parts(4x4))", Layout((128, 128))),
    "topp": ("topp(p=0.5,most=0.5,least=2)", Layout((21, 45, 80))),
    "topp, under": ("topp(p=0.5,rule=under)", Layout((90, 100))),
    "above": ("above(tau=1.0,most=0.3,always=near(1))", Layout((21, 45, 80))),
    "topk, causal frames": ("topk(keep=0.1,block=1x8x16,key_block=1x8x8,causal=1x0x0)", Layout((21, 44, 80), 7)),
    "topp, causal line": ("topp(p=0.5,block=64,always=self+first(1),causal=true)", Layout(20_000)),
    "long rows": ("topk(keep=64,block=32,always=first(1))", Layout(200_000)),
}


def inputs_of(layout: Layout, exact: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of 8 heads and keys of 4, two samples."""
    made = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, layout.length, heads, 128) for heads in (8, 4)]
    if exact:
        q, k = (torch.randint(-1, 2, shape, generator=made, device="cuda").to(dtype) for shape in shapes)
    else:
        q, k = (torch.randn(shape, generator=made, device="cuda").to(dtype) for shape in shapes)
    return q, k


def check(name: str, exact: bool, masked: bool) -> str:
    """What is wrong with a case, empty if nothing is."""
    text, layout = CASES[name]
    pattern, at = parse(text), inner(layout)
    assert isinstance(pattern, DynamicPattern)
    q, k = inputs_of(layout, exact, torch.bfloat16)
    made = torch.Generator("cuda").manual_seed(1)
    valid = torch.rand(2, layout.tokens, generator=made, device="cuda") > 0.3 if masked else None
    blocks = pattern.blocks(layout.grid)
    args = pattern, q[:, at], k[:, at], blocks, valid, 0.25 if exact else 128**-0.5
    found, again, want = chosen(*args), chosen(*args), pattern.chosen_by_torch(*args[1:])
    if found is None or again is None:
        return f"{name}: no kernel chooses"
    problems = []
    if not torch.equal(found.tiles, again.tiles):
        problems.append("two runs differ")
    seen, wanted = found.mask(0, blocks.columns), want.mask(0, blocks.columns)
    off = int((seen != wanted).sum()) / max(1, int(wanted.sum()))
    # Exponentials are rounded in either way.
    exactly = 0 if text.startswith("topk") and "parts" not in text else 1e-6
    if off > (exactly if exact else ALLOWED):
        problems.append(f"{off:.1e} of the entries differ")
    print(f"{'WRONG' if problems else 'ok':<6}{name}, exact {exact}, masked {masked}: {off:.1e} differ", flush=True)
    return f"{name}: {'; '.join(problems)}" if problems else ""


def time(name: str) -> None:
    """Print milliseconds of a case on 24 heads: by both, and of each kernel with some numbers of warps."""
    text, layout = CASES[name]
    pattern = parse(text)
    assert isinstance(pattern, DynamicPattern)
    q, k = torch.randn(2, 1, layout.tokens, 24, 128, device="cuda", dtype=torch.bfloat16)
    args = q, k, pattern.blocks(layout.grid), None, 128**-0.5
    times = in_turns({"kernels": partial(chosen, pattern, *args), "torch": partial(pattern.chosen_by_torch, *args)})
    print(name, {who: round(ms, 3) for who, ms in times.items()}, flush=True)
    found: dict[str, float] = {}
    means, scores, rows = choose.MEAN_WARPS, choose.SCORE_WARPS, choose.ROW_WARPS
    for warps in (1, 2, 4, 8):
        choose.MEAN_WARPS = choose.SCORE_WARPS = max(2, warps)
        choose.ROW_WARPS = {choose.LARGEST: warps}
        for kernel, us in kernel_times(partial(chosen, pattern, *args)).items():
            found[f"{kernel}, {warps if kernel == 'select' else max(2, warps)} warps"] = round(us)
    choose.MEAN_WARPS, choose.SCORE_WARPS, choose.ROW_WARPS = means, scores, rows
    print(name, "microseconds", found, flush=True)


def kernel_times(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of a call, all its launches together."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = seen.key_averages()
    names = ("part_means", "pair_scores", "select")
    return {name: sum(e.device_time_total for e in events if e.key.startswith(name)) for name in names}


def main() -> int:
    """Check all cases, then time some of them on 24 heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    torch.backends.cuda.matmul.allow_tf32 = False
    print(versions())
    wrong = [check(name, exact, masked) for name in CASES if only in name for exact, masked in VARIANTS]
    for name in ("topk", "topk, 128 x 64", "topk, video", "topp"):
        if only in name:
            time(name)
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
