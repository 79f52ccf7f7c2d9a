"""Does the kernel of the hub, loaded from its folder alone, give on a GPU what the package gives, and in which time?

python -m scripts.check.hub_kernel_gpu --out out/hub-kernel.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_common import versions
from scripts.hub.build_kernel import IDENTITY, build
from scripts.hub.lists import make_plan
from visattn import Layout, attention
from visattn.timing import interleave

CASES = (
    ("na(window=9x9)", Layout((64, 64), prefix=256), torch.bfloat16, 128),
    ("na(window=15x15)", Layout((64, 64), prefix=5), torch.float16, 64),
    ("na(window=3x9x9)", Layout((8, 32, 32), suffix=77), torch.bfloat16, 64),
    ("na(window=7x7)", Layout((32, 32)), torch.float32, 64),
)


def load(folder: Path) -> Any:
    """The kernel of a folder, under its own name."""
    place = folder / "build" / "torch-cuda"
    spec = importlib.util.spec_from_file_location(
        IDENTITY, place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[IDENTITY] = made
    spec.loader.exec_module(made)
    return made


def compare(kernel: Any, pattern: str, layout: Layout, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Largest differences of output and gradients relative to the package's, and times of a forward."""
    device = torch.device("cuda", torch.cuda.current_device())
    made = make_plan(pattern, layout, dtype, head_dim, device)
    plan = kernel.Plan(*(kernel.Lists(*side) for side in made))
    shape = 2, layout.length, 8, head_dim
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    weight = torch.randn(shape, dtype=dtype, device=device)
    results = []
    for run in (
        lambda: kernel.tile_attention(q, k, v, plan)[0],
        lambda: attention(q, k, v, pattern, layout, backend="triton"),
    ):
        out = run()
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), weight)])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
    runs = {
        "kernel": lambda: kernel.tile_attention(q, k, v, plan),
        "package": lambda: attention(q, k, v, pattern, layout, backend="triton"),
    }
    with torch.no_grad():
        times = interleave(runs, repeats=7, at_least=0.02)
    names = ("out", "dq", "dk", "dv")
    return {
        "pattern": pattern,
        "layout": str(layout),
        "dtype": str(dtype),
        "head_dim": head_dim,
        "errors": dict(zip(names, errors, strict=True)),
        **{f"{name}_ms": 1e3 * timing.median for name, timing in times.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "kernel")
        kernel = load(Path(folder) / "kernel")
        rows = [compare(kernel, *case) for case in CASES]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**versions(), "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(row)
    wrong = [row for row in rows if max(row["errors"].values()) > (1e-4 if "float32" in row["dtype"] else 2e-2)]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} calls differ from the package's")


if __name__ == "__main__":
    main()
