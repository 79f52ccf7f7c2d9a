"""Every Triton kernel once on small inputs, for compute-sanitizer.

    python3 -m scripts.check.sanitize_gpu                     # first: compiles
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m scripts.check.sanitize_gpu
    compute-sanitizer --tool racecheck --error-exitcode 9 python3 -m scripts.check.sanitize_gpu

Without torch's memory pool every tensor is an allocation of its own, so that a read behind its end is seen.
"""

from __future__ import annotations

import argparse
import sys

import torch

from visattn import Layout, attention, parse
from visattn.patterns import BiasedPattern, ListedPattern

# Pattern, layout, head dim, whether keys are masked, whether there is a bias.
CASES = (
    ("na(window=9x9)", Layout((20, 19), 5, 33), 128, False, False),
    ("na(window=9x9)", Layout((20, 19), 5, 33), 40, True, True),
    ("clear(radius=6,pool=4)", Layout((19, 21), 0, 9), 64, True, False),
    ("radial(decay=0.3)", Layout((3, 10, 11)), 64, False, False),
    ("routing(regions=4x3,topk=3)", Layout((19, 18), 3), 64, False, False),
    ("agent(agents=5x4)", Layout((19, 18)), 64, True, False),
    ("linear(feature=elu)", Layout((19, 18), 1), 72, True, False),
    ("linear(feature=hedgehog)", Layout((19, 18)), 64, False, False),
)


def main() -> int:
    """Forward and backward of each case in half and single precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="patterns whose text contains this")
    chosen = parser.parse_args()
    for pattern, layout, dim, masked, biased in CASES:
        if chosen.only not in pattern:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            q, k, v = (
                torch.randn(2, layout.length, h, dim, device="cuda", dtype=dtype, requires_grad=True) for h in (4, 2, 2)
            )
            mask = torch.rand(2, layout.length, device="cuda") > 0.3 if masked else None
            parsed = parse(pattern)
            sides = parsed.rpb_shape(layout.grid) if isinstance(parsed, BiasedPattern) else None
            rpb = torch.randn((4, *sides), device="cuda", requires_grad=True) if biased and sides else None
            backend = "triton" if isinstance(parsed, ListedPattern) else "auto"
            out = attention(q, k, v, pattern, layout, key_mask=mask, rpb=rpb, backend=backend)
            out.float().square().sum().backward()
            assert q.grad is not None
            print(pattern, dtype, float(out.float().norm()), float(q.grad.float().norm()), flush=True)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
