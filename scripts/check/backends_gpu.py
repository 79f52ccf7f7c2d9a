"""Every backend against the reference on a GPU, without pytest: the cases of tests/kernels/test_shared.py.

    python3 -m scripts.check.backends_gpu [NAME ...]

Prints one line a case; the last line counts what ran, what was refused and what failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from visattn import Layout, attention, parse
from visattn.dispatch import BACKENDS, load, verdict
from visattn.patterns import BiasedPattern
from visattn.problem import Call, Problem

CASES = (
    ("dense", Layout((7, 9), 3, 2)),
    ("na(window=5x3)", Layout((13, 11), 1, 17)),
    ("na(window=4,stride=2,causal=true)", Layout(37)),
    ("na(window=3x2,dilation=2x4)", Layout((9, 11), 2, 0)),
    ("na(window=3x4x4,stride=1x2x2)", Layout((5, 6, 7), 0, 4)),
    ("na(window=4x4,stride=4x4)", Layout((8, 12))),
    ("halo(block=4x3,halo=1)", Layout((10, 9), 1, 2)),
    ("clear(radius=3,pool=4)", Layout((9, 8), 0, 5)),
    ("radial(decay=0.5,block=16)", Layout((4, 24), 0, 6)),
    ("na(window=9x9)", Layout((40, 40), 0, 77)),
)
VARIANTS = ("plain", "key mask", "rpb", "gqa", "bfloat16")


def outputs(name: str, call: Call, inputs: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients of one backend."""
    given = {"scale": call.scale, "key_mask": call.key_mask, "rpb": call.rpb}
    q, k, v = inputs[:3]
    if call.lse:
        out, lse = attention(q, k, v, call.pattern, call.layout, backend=name, return_lse=True, **given)
        found = [out, lse.masked_fill(lse == -torch.inf, 123.0)]
    else:
        found = [attention(q, k, v, call.pattern, call.layout, backend=name, **given)]
    if not grad:
        return found
    weights = [torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in found]
    return found + list(torch.autograd.grad(found, inputs, weights))


def check(name: str, text: str, layout: Layout, variant: str, grad: bool, lse: bool) -> str:
    """Run one case; returns its verdict."""
    torch.manual_seed(0)
    pattern, dtype = parse(text), torch.bfloat16 if variant == "bfloat16" else torch.float32
    heads = (4, 2, 2) if variant == "gqa" else (4, 4, 4)
    inputs = [torch.randn(2, layout.length, h, 32, device="cuda", dtype=dtype, requires_grad=grad) for h in heads]
    sides = None
    if variant == "rpb" and isinstance(pattern, BiasedPattern):
        sides = pattern.rpb_shape(layout.grid)
    if variant == "rpb" and sides is None:
        return ""
    rpb = None if sides is None else torch.randn(4, *sides, device="cuda", requires_grad=grad)
    mask = None
    if variant == "key mask":
        mask = torch.rand(2, layout.length, device="cuda") < 0.6
        mask[0] = False
    call = Call(pattern, layout, 0.3, mask, rpb, lse)
    support = verdict(load(name), Problem.of(inputs[0], inputs[1], inputs[2], call))
    if not support.ok:
        return f"refused: {support.reason}"
    inputs += [] if rpb is None else [rpb]
    ours, theirs = (outputs(n, call, inputs, grad) for n in (name, "reference"))
    error = max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(ours, theirs, strict=True))
    # Generated kernels round float32 products to TF32.
    limit = 0.03 if dtype == torch.bfloat16 else 1e-2
    return f"ok {error:.1e}" if error <= limit else f"FAILED {error:.1e}"


def main() -> None:
    """Check the backends named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="backends; default all that are usable here")
    count: Counter[str] = Counter()
    for name in parser.parse_args().names or [n for n in BACKENDS.usable() if n != "reference"]:
        for text, layout in CASES:
            for variant in VARIANTS:
                # FlexAttention compiles every one of them for seconds: the forms with most in them will do.
                for grad, lse in ((True, True), (False, False))[: 1 if name == "flex" else 2]:
                    try:
                        said = check(name, text, layout, variant, grad, lse)
                    except Exception as error:  # Report it and go on with the other cases.
                        said = f"FAILED {type(error).__name__}: {error!s:.300}"
                    if said:
                        count[said.split(" ")[0].rstrip(":")] += 1
                    if said and not said.startswith("refused"):
                        print(f"{name:<9} {text:<36} {layout!s:<26} {variant:<9} grad={grad} {said}", flush=True)
    print(dict(count))
    sys.exit(bool(count["FAILED"]))


if __name__ == "__main__":
    main()
