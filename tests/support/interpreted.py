"""Tests of kernels in Triton's interpreter."""

import os
import subprocess
import sys

from tests.support.places import ROOT

WHERE = ROOT / "tests/kernels/triton/interpreter"
# About half of the work.
LISTS = "test_kernels.py"


def passes(lists):
    """Run those along lists, or all others: Triton decides when it is imported whether it interprets."""
    chosen = [str(WHERE / LISTS)] if lists else [str(WHERE), f"--ignore={WHERE / LISTS}"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
