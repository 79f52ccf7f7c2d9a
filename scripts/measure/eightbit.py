"""How good attention in 8 bits is: errors of each part on normal data, and pictures of the embedded emoji model.

    python -m scripts.measure.eightbit --out docs/results/eightbit.json [--pictures 4] [--steps 8]

Simulated on the CPU (docs/precision.md). Pictures are those of the same model, pattern, prompt and noise, once in the
model's own dtype and once in 8 bits, all steps or all but the first `FIRST`; cosines are those of each query's output
at the calls of the first picture. What the file has is not measured again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from scripts import cli
from scripts.continued import earlier
from visattn import Layout, apply, attention
from visattn.environment import cpu_name
from visattn.files import write_json
from visattn.kernels.tiles import eightbit
from visattn.metrics import psnr
from visattn.pipelines.load import load_pipeline
from visattn.problem import PRECISIONS
from visattn.watch import Watched

PROMPTS = ("a red apple", "bus, gradient", "post office, gradient")
PATTERNS = ("na(window=13x13)", "na(window=16x16, stride=8x8)")
# Cosines of every so many-th call: simulating one takes as long as ten.
EVERY = 16
# Steps that stay in the model's own dtype in the second picture of 8 bits.
FIRST = 2
WINDOW, GRID = "na(window=32x32)", Layout((64, 64))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over that of the truth `b`."""
    return float((a.double() - b).norm() / b.norm())


def exact_bytes(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`eightbit.as_bytes` without rounding."""
    return x, x.new_ones(()).expand([1 if i in dims else n for i, n in enumerate(x.shape)])


def parts_of_error() -> dict[str, dict[str, float]]:
    """Relative errors on normal data where one part alone is rounded, and where all are."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, GRID.length, 2, 128, generator=made) for _ in range(3))
    truth = attention(q.double(), k.double(), v.double(), WINDOW, GRID)
    as_bytes, values, weights = eightbit.as_bytes, eightbit._values, eightbit._weights
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        # Values are rounded by as_bytes too, so each part brings its own.
        own: dict[str, dict[str, Callable[..., Any]]] = {
            "queries and keys": {"as_bytes": as_bytes},
            "values": {"_values": lambda x, fp8: values(x, fp8) if fp8 else as_bytes(x, (1,))},
            "weights": {"_weights": weights},
            "all": {"as_bytes": as_bytes, "_values": values, "_weights": weights},
        }
        exact = {
            "as_bytes": exact_bytes,
            "_values": lambda x, fp8: exact_bytes(x, (1,)),
            "_weights": lambda x, fp8: x,
        }
        found[precision] = {}
        for part, rounded in own.items():
            with ExitStack() as stack:
                for name, function in (exact | rounded).items():
                    stack.enter_context(patch.object(eightbit, name, function))
                out = attention(q, k, v, WINDOW, GRID, precision=precision, backend="tiles")
            found[precision][part] = relative(out, truth)
    return found


class Cosines:
    """Looks at calls: the cosine of each query's output in 8 bits to the exact one, and the relative error."""

    def __init__(self) -> None:
        self._calls = 0
        self.found: dict[str, list[tuple[float, float, float]]] = {precision: [] for precision in PRECISIONS}

    def __call__(self, watched: Watched) -> None:
        """Called at every attention call."""
        self._calls += 1
        if self._calls % EVERY:
            return
        given: dict[str, Any] = {"scale": watched.scale, "key_mask": watched.key_mask, "backend": "tiles"}
        q, k, v = watched.q, watched.k, watched.v
        exact = attention(q, k, v, watched.pattern, watched.layouts[0], **given).double()
        for precision in PRECISIONS:
            ours = attention(q, k, v, watched.pattern, watched.layouts[0], **given, precision=precision).double()
            cosine = torch.nn.functional.cosine_similarity(ours.flatten(2), exact.flatten(2), -1)
            self.found[precision].append((float(cosine.mean()), float(cosine.min()), relative(ours, exact)))

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and least cosine, mean relative error."""
        return {
            precision: {
                "calls": len(rows),
                "cosine": statistics.fmean(row[0] for row in rows),
                "least_cosine": min(row[1] for row in rows),
                "error": statistics.fmean(row[2] for row in rows),
            }
            for precision, rows in self.found.items()
        }


def picture(pipe: Any, pattern: str, prompt: str, steps: int, watcher: Cosines | None, **options: Any) -> torch.Tensor:
    """One picture [1, 3, H, W] from 0 to 1."""
    with apply(pipe, pattern, always=True, **options) as handle:
        handle.watch(watcher)
        noise = torch.Generator().manual_seed(0)
        found = pipe(prompt=prompt, num_inference_steps=steps, generator=noise, output_type="np").images[0]
    return torch.from_numpy(np.asarray(found)).permute(2, 0, 1)[None]


def measure(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Add what a report lacks, and write it after each."""

    def keep() -> None:
        write_json(chosen.out, report)

    if "normal" not in report:
        report["normal"] = {"pattern": WINDOW, "layout": str(GRID), "head_dim": 128, "errors": parts_of_error()}
        keep()
    pipe = load_pipeline("emoji", "cpu", None)
    pipe.set_progress_bar_config(disable=True)
    for pattern in PATTERNS:
        for prompt in PROMPTS[: chosen.pictures]:
            key = f"{pattern}: {prompt}"
            found: dict[str, Any] = report["pictures"].get(key, {})
            ways = {"psnr": {}, "psnr_later": {"precise_steps": FIRST}}
            todo = [(p, name) for p in PRECISIONS for name in ways if name not in found.get(p, {})]
            if not todo:
                continue
            watcher = Cosines() if prompt == PROMPTS[0] and not found else None
            own = picture(pipe, pattern, prompt, chosen.steps, watcher)
            for precision, name in todo:
                ours = picture(pipe, pattern, prompt, chosen.steps, None, precision=precision, **ways[name])
                found.setdefault(precision, {})[name] = float(psnr(ours, own))
            for precision, seen in watcher.summary().items() if watcher is not None else ():
                found[precision] |= seen
            report["pictures"][key] = found
            print(key, found, flush=True)
            keep()


def main() -> None:
    """Measure what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=cli.file_to_write, required=True, help="JSON file")
    parser.add_argument("--pictures", type=cli.count, default=len(PROMPTS), help="of each pattern")
    parser.add_argument("--steps", type=cli.count, default=8)
    parser.add_argument("--threads", type=cli.count, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    report: dict[str, Any] = {
        "device": cpu_name(), "steps": chosen.steps, "torch": torch.__version__, "pictures": {},
    }  # fmt: skip
    with cli.told("measure_eightbit"), cli.only_writer(chosen.out):
        measure(earlier(chosen.out, report) or report, chosen)


if __name__ == "__main__":
    main()
