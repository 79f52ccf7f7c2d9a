"""What the GPU scripts share: starting themselves again, measuring for a time, and the truth of sampled queries."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.continued import earlier
from visattn.files import write_json


def itself(*arguments: str) -> list[str]:
    """The command that starts the running script, `python -m scripts.ROOM.NAME`, with these arguments."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "start the scripts with python -m"
    return [sys.executable, "-m", spec.name, *arguments]


def compile_first(jobs: int) -> None:
    """Run this script in several processes with `--compile i/jobs`, to fill the compilers' caches on disk."""
    for process in [subprocess.Popen(itself(*sys.argv[1:], "--compile", f"{i}/{jobs}")) for i in range(jobs)]:
        process.wait()


def go_on(report: dict[str, Any], out: Path | None, key: str = "cases") -> None:
    """Give a report the cases that its file has from the same versions, so that none is lost when it is written.

    Args:
        report: With "versions", settings, and no cases yet.
        out: JSON file that an earlier run may have written, or None.
        key: Under which the cases are, by name or as a list of rows.

    Raises:
        SystemExit: If its cases are of another GPU, other versions or other settings.
    """
    try:
        known = earlier(out, report)
    except ValueError as error:
        sys.exit(str(error))
    if known is not None:
        report["versions"] = known["versions"] | report["versions"]
        if isinstance(report[key], list):
            report[key] = known[key] + report[key]
        else:
            report[key] |= known[key]


def add_rows(
    report: dict[str, Any], rows: Iterable[dict[str, Any]], same: Sequence[str], out: Path | None, key: str = "cases"
) -> None:
    """Put rows in a report, in the place of those of the same case if there are any, and write it.

    Args:
        report: With a list of rows.
        rows: What was measured.
        same: What rows of the same case have in common, by name; one that a row lacks is a value of its own.
        out: JSON file or None.
        key: Under which the rows are.
    """
    case = lambda row: json.dumps([row.get(name) for name in same], default=str)  # noqa: E731
    found = {case(row): row for row in report[key]}
    found |= {case(row): row for row in rows}
    report[key] = list(found.values())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)


def measure_cases(
    names: Iterable[str], measured: Callable[[str], Any], report: dict[str, Any], out: Path | None, end: float
) -> None:
    """Measure cases into `report["cases"]` until a time of `time.perf_counter`, writing the report after each.

    Args:
        names: Of the cases.
        measured: Measures one.
        report: What is written.
        out: JSON file or None.
        end: After it no case is begun.
    """
    for name in names:
        if time.perf_counter() > end:
            return
        report["cases"][name] = measured(name)
        if out is not None:
            write_json(out, report)


def versions() -> dict[str, str]:
    """The GPU and the libraries that a measurement depends on."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
    }


def sampled_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, pattern: str, layout: Any
) -> float:
    """Relative error of some rows of `out` against float64, over the keys that the pattern's own plan shows them.

    Args:
        q: Queries [1, S, H, D].
        k: Keys [1, S, H, D], extra keys appended.
        v: Values likewise.
        out: What is checked, [1, S, H, D].
        pattern: Text of a static pattern.
        layout: The tokens.
    """
    from visattn import plan

    tiles = plan(pattern, layout)
    rng = np.random.default_rng(0)
    wrong = right = 0.0
    for tile in rng.choice(tiles.queries.tiles, min(12, tiles.queries.tiles), replace=False):
        slots = np.flatnonzero(tiles.queries.tokens[tile] >= 0)
        slot = rng.choice(slots)
        token = int(tiles.queries.tokens[tile, slot])
        keys = []
        for entry in range(tiles.lists.start[tile], tiles.lists.start[tile + 1]):
            tokens, mask = tiles.keys.tokens[tiles.lists.tile[entry]], tiles.lists.mask[entry]
            keys.append(tokens if mask < 0 else tokens[tiles.masks[mask, slot]])
        index = torch.from_numpy(np.concatenate(keys)).to(q.device)
        one_q, some_k, some_v = q[0, token].double(), k[0, index].double(), v[0, index].double()
        weights = torch.einsum("hd,khd->hk", one_q, some_k).mul(q.shape[-1] ** -0.5).softmax(-1)
        truth = torch.einsum("hk,khd->hd", weights, some_v)
        wrong += float((out[0, token].double() - truth).square().sum())
        right += float(truth.square().sum())
    return (wrong / right) ** 0.5
