"""Opt-in tuning of the Triton kernels on a real GPU: choices are made once, and read back from their file.

    python3 -m scripts.check.tune_gpu [--candidates 4]

Exit status 1 if a second process tunes again, or results differ from the untuned ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from scripts.gpu_common import itself
from visattn import Layout, attention
from visattn.kernels.triton import tune

PATTERN, LAYOUT = "na(window=15x15)", Layout((48, 48), 7)


def run() -> list[torch.Tensor]:
    """Output and gradients of one call."""
    made = torch.Generator("cuda").manual_seed(0)
    shape = (1, LAYOUT.length, 4, 64)
    q, k, v = (torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(q, k, v, PATTERN, LAYOUT, backend="triton")
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def tuned(most: int) -> int:
    """One process that tunes, if it has to; prints how often it timed a configuration."""
    timed = []
    fastest, candidates = tune.fastest, tune.candidates

    def counted(choices: list, clock: object) -> object:
        timed.append(len(choices))
        return fastest(choices, clock)  # type: ignore[arg-type]

    tune.fastest = counted
    tune.candidates = lambda *given: candidates(*given)[:most]
    begin = time.perf_counter()
    ours = run()
    seconds = time.perf_counter() - begin
    os.environ["VISATTN_AUTOTUNE"] = "0"
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(ours, run(), strict=True)]
    print(json.dumps({"timed": timed, "seconds": round(seconds, 2), "errors": errors}))
    return int(max(errors) > 1e-2)


def main() -> int:
    """Tune in one process, read back in another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=4, help="configurations timed per direction")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        return tuned(chosen.candidates)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VISATTN_AUTOTUNE": "1", "VISATTN_CACHE": folder}
        command = itself("--inside", "--candidates", str(chosen.candidates))
        lines = [
            json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        ]
        stored = json.loads((Path(folder) / "triton.json").read_text())
    for line in lines:
        print(line)
    for key, value in stored.items():
        print(key, value)
    right = bool(lines[0]["timed"]) and not lines[1]["timed"] and len(stored) == len(lines[0]["timed"])
    print("read back" if right else "WRONG: the second process tuned again, or the file is not what was timed")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
