"""Measures what MoH saves: the last stage's attention with every head computed, and with unused heads left out.

    python -m scripts.bench.moh --out docs/results/moh.json

Random weights and inputs: tokens choose their heads about evenly. The two take turns in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

import visattn.models  # noqa: F401  registers the backbones
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.models.backbones.moh import MoHAttention
from visattn.timing import interleave

NAMES = ("moh_vit_small_80", "moh_vit_small_75", "moh_vit_base_75", "moh_vit_base_50")
SIDES = (16, 32, 48)


@torch.inference_mode()
def measure(name: str, side: int, repeats: int) -> dict[str, Any]:
    """One attention layer of a model's last stage on a map of side * side tokens."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    layer: Any = [module for module in model.modules() if isinstance(module, MoHAttention) and module.routed][-1]
    x = torch.randn(1, side, side, layer.proj.in_features)

    def run(skip: bool) -> torch.Tensor:
        layer.skip_heads, layer.skip_from = skip, 0
        return layer(x)

    difference = (run(True) - run(False)).abs().max().item() / run(False).std().item()
    times = interleave({"every": lambda: run(False), "used": lambda: run(True)}, repeats=repeats)
    return {
        "name": name,
        "tokens": side * side,
        "heads": layer.num_heads,
        "shared": layer.shared,
        "routed": layer.routed,
        "difference": difference,
        **{key: timing.to_dict() for key, timing in times.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.names:
        for side in options.sides:
            row = measure(name, side, options.repeats)
            rows.append(row)
            print(f"{name:<18} {row['tokens']:>6}", *(f"{row[k]['median'] * 1e3:8.1f} ms" for k in ("every", "used")))
    if options.out:
        found = {"versions": versions(), "devices": devices(), "rows": rows}
        write_json(options.out, found, indent=2)


if __name__ == "__main__":
    main()
