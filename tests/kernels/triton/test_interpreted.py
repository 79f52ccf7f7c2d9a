"""The kernels in the interpreter: Triton decides when it is imported whether it interprets."""

import os
import subprocess
import sys

import pytest

from tests.support.places import ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.early


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/triton/interpreter"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
