"""Does the kernel of the hub, loaded from its folder alone, give on a GPU what the package gives, and in which time?

With --hub a process without visattn loads it by `kernels.get_local_kernel`, outside of the repository, whose kernels/
would hide that package, and what it gives is compared, too.

python -m scripts.check.hub_kernel_gpu --out out/hub-kernel.json
python -m scripts.check.hub_kernel_gpu --hub FOLDER --out out/hub-kernel.json
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_common import add_rows, go_on, versions
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
NAMES = ("out", "dq", "dk", "dv")
# Runs alone: loads the kernel and calls it on what was saved.
APART = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
folder = Path(sys.argv[1])
kernel = get_local_kernel(folder / "kernel", backend=sys.argv[2])
found = []
for case in torch.load(folder / "given.pt", weights_only=True):
    device = sys.argv[3]
    plan = kernel.Plan(**{name: kernel.Lists(**{key: t if not isinstance(t, torch.Tensor) else t.to(device)
        for key, t in side.items()}) for name, side in case["lists"].items()})
    q, k, v, weight = (t.to(device).requires_grad_() for t in case["tensors"])
    out = kernel.tile_attention(q, k, v, plan)[0]
    grads = torch.autograd.grad(out, (q, k, v), weight)
    found.append([t.detach().cpu() for t in (out, *grads)])
    print("case", len(found), flush=True)
torch.save(found, folder / "found.pt")
assert not [name for name in sys.modules if name.split(".")[0] in ("visattn", "scripts")]
"""


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
    return {
        "pattern": pattern,
        "layout": str(layout),
        "dtype": str(dtype),
        "head_dim": head_dim,
        "errors": dict(zip(NAMES, errors, strict=True)),
        **{f"{name}_ms": 1e3 * timing.median for name, timing in times.items()},
    }


def apart(folder: Path, hub: Path, device: torch.device, cases: Any = CASES) -> list[dict[str, Any]]:
    """The kernel of a folder by the loader of `kernels`, in a process that has no visattn: differences of each case.

    Args:
        folder: Has the kernel, as `kernel/`.
        hub: Has the package `kernels`, as of `pip install --target`.
        device: Where it runs.
        cases: As `CASES`.
    """
    given, wanted = [], []
    for pattern, layout, dtype, head_dim in cases:
        plan = make_plan(pattern, layout, dtype, head_dim, device)
        shape = 2, layout.length, 8, head_dim
        q, k, v, weight = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = attention(q, k, v, pattern, layout, backend="triton")
        wanted.append([out.detach(), *torch.autograd.grad(out, (q, k, v), weight)])
        lists = {name: dict(side._asdict()) for name, side in plan._asdict().items()}
        given.append({"lists": lists, "tensors": [t.detach() for t in (q, k, v, weight)]})
    torch.save(given, folder / "given.pt")
    command = [sys.executable, "-c", APART, str(folder), "cuda" if device.type == "cuda" else "cpu", device.type]
    environment = {**os.environ, "PYTHONPATH": str(hub), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    found = torch.load(folder / "found.pt", weights_only=True)
    rows = []
    for (pattern, layout, dtype, head_dim), ours, theirs in zip(cases, found, wanted, strict=True):
        errors = [float((a - b.cpu()).abs().max() / b.abs().max().cpu()) for a, b in zip(ours, theirs, strict=True)]
        named = {"pattern": pattern, "layout": str(layout), "dtype": str(dtype), "head_dim": head_dim}
        rows.append({**named, "loader": "get_local_kernel", "errors": dict(zip(NAMES, errors, strict=True))})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; its rows of other cases stay")
    parser.add_argument("--hub", type=Path, help="folder with the package kernels, as of pip install --target")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {"versions": versions(), "rows": []}
    go_on(report, given.out, "rows")
    rows: list[dict[str, Any]] = []

    def add(*more: dict[str, Any]) -> None:
        rows.extend(more)
        for row in more:
            print(row, flush=True)
        add_rows(report, more, ("pattern", "layout", "dtype", "head_dim", "loader"), given.out, "rows")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "kernel")
        kernel = load(folder / "kernel")
        for case in CASES:
            add(compare(kernel, *case))
        # Last: whatever is wrong with another package takes nothing from these.
        if given.hub is not None:
            add(*apart(folder, given.hub.resolve(), device))
    wrong = [row for row in rows if max(row["errors"].values()) > (1e-4 if "float32" in row["dtype"] else 2e-2)]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} calls differ from the package's")


if __name__ == "__main__":
    main()
