"""The suites after LongCA-bench and CAB on a GPU, within a budget: results are written after every case.

python3 -m scripts.bench.suites_gpu --suite longca --seconds 150 --out longca.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from visattn.bench import backend_names
from visattn.environment import devices, versions
from visattn.suites import NAMES, Entry, Measured, run_suite, suite


def main() -> None:
    """Run one suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=NAMES, required=True)
    parser.add_argument("--seconds", type=float, default=150.0, help="for all cases, short sequences first")
    parser.add_argument("--backend", default="triton,flex", help="names with commas, or all")
    parser.add_argument("--scale", default="", help="only the cases of this scale: small or large")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dtype = "float32" if given.device == "cpu" else "bfloat16"
    entries = suite(given.suite, given.device, dtype=dtype, backward=given.backward)
    entries = [entry for entry in entries if given.scale in ("", entry.scale)]
    about = {"versions": versions(), "devices": devices(), "suite": given.suite, "seconds": given.seconds}

    def tell(number: int, entry: Entry) -> None:
        print(f"[{number}/{len(entries)}] {entry.kind}, {entry.scale}: {entry.case}", flush=True)

    def keep(found: list[Measured]) -> None:
        given.out.write_text(json.dumps(about | {"results": [each.to_dict() for each in found]}, indent=1) + "\n")
        last = found[-1]
        if last.result is not None:
            times = [f"{line.backend} {line.timing.median * 1e3:.3f} ms" for line in last.result.lines if line.timing]
            print(f"  {', '.join(times)}", flush=True)

    names = backend_names(given.backend)
    found = run_suite(entries, names, budget=given.seconds, repeats=given.repeats, tell=tell, done=keep)
    print(f"{sum(each.result is not None for each in found)} of {len(found)} cases: {given.out}")


if __name__ == "__main__":
    main()
