"""The suites after LongCA-bench and CAB on a GPU, within a budget: results are written after every case.

    python3 -m scripts.bench.suites_gpu --suite longca --backend triton --seconds 90 --jobs 8 --out longca.json
    python3 -m scripts.bench.suites_gpu --suite longca --backend flex --seconds 90 --jobs 8 --out longca.json

`--jobs` compiles in that many processes first, for a third of the budget at most. What the file has of a case is not
measured again: other backends are added, compared with dense attention in turns of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.continued import earlier
from scripts.gpu_common import compile_first
from visattn.bench import DENSE, Case, Result, backend_names, contenders
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.suites import NAMES, Entry, Measured, run_suite, suite


def compile_share(entries: Sequence[Entry], names: Sequence[str], share: str, seconds: float) -> None:
    """Call what runs a share "i/n" of the cases once, so that compilers have their results on disk."""
    index, of = map(int, share.split("/"))
    start = time.monotonic()
    for entry in entries[index::of]:
        if time.monotonic() - start > seconds:
            return
        try:
            _call_each(entry.case, names)
        except (RuntimeError, MemoryError) as error:
            # The measurement says why, too.
            print(f"{entry.case}: {error}", flush=True)


def _call_each(case: Case, names: Sequence[str]) -> None:
    """Its tensors are gone when it returns: others of the share may be large."""
    for name, run in contenders(case, names)[0].items():
        if name != DENSE:
            run()


def case_of(each: dict[str, Any]) -> str:
    """What tells one case of a suite from another."""
    return json.dumps([each["mask"], each["kind"], each["scale"], each["case"]])


def merged(known: dict[str, Any], each: dict[str, Any]) -> dict[str, Any]:
    """What was known of a case, with the backends that are new."""
    have = {line["backend"] for line in known["lines"]}
    return known | {"lines": known["lines"] + [line for line in each["lines"] if line["backend"] not in have]}


class Kept:
    """The file of results, which other runs may have begun.

    Args:
        out: The file.
        about: What is said of the results in a new one.
        on: Device that this run measures on.

    Raises:
        ValueError: If the file has results of another suite, device or other versions.
    """

    def __init__(self, out: Path, about: dict[str, Any], on: str) -> None:
        self._out, self._about = out, earlier(out, about, on) or about
        self._known = {case_of(each): each for each in self._about.get("results", []) if each["lines"]}

    def has(self, entry: Entry, names: Sequence[str]) -> bool:
        """Whether a case is known for these backends."""
        found = self._known.get(case_of(Measured(entry, Result(entry.case)).to_dict()))
        return found is not None and set(names) <= {line["backend"] for line in found["lines"]}

    def add(self, found: list[Measured]) -> None:
        """Write the last case that was measured."""
        last = found[-1]
        if last.result is None:
            return
        each = last.to_dict()
        key = case_of(each)
        self._known[key] = merged(self._known[key], each) if key in self._known else each
        write_json(self._out, self._about | {"results": list(self._known.values())})
        times = [f"{line.backend} {line.timing.median * 1e3:.3f} ms" for line in last.result.lines if line.timing]
        print(f"  {', '.join(times)}", flush=True)


def main() -> None:
    """Run one suite."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=NAMES, required=True)
    parser.add_argument("--seconds", type=float, default=150.0, help="for all cases, short sequences first")
    parser.add_argument("--backend", default="triton,flex", help="names with commas, or all")
    parser.add_argument("--scale", default="", help="only the cases of this scale: small or large")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dtype = "float32" if given.device == "cpu" else "bfloat16"
    names = backend_names(given.backend)
    try:
        kept = Kept(given.out, {"versions": versions(), "devices": devices(), "suite": given.suite}, given.device)
    except ValueError as error:
        sys.exit(str(error))
    entries = suite(given.suite, given.device, dtype=dtype, backward=given.backward)
    entries = [each for each in entries if given.scale in ("", each.scale) and not kept.has(each, names)]
    if given.compile:
        return compile_share(entries, names, given.compile, given.seconds / 3)
    if given.jobs > 1:
        compile_first(given.jobs)

    def tell(number: int, entry: Entry) -> None:
        print(f"[{number}/{len(entries)}] {entry.kind}, {entry.scale}: {entry.case}", flush=True)

    # A long case may have held the compiling processes.
    left = max(given.seconds / 3, given.seconds - (time.monotonic() - start))
    found = run_suite(entries, names, budget=left, repeats=given.repeats, tell=tell, done=kept.add)
    print(f"{sum(each.result is not None for each in found)} of {len(found)} cases: {given.out}")


if __name__ == "__main__":
    main()
