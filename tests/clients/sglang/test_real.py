"""The plug-in inside SGLang 0.5.23, where VISATTN_TEST_SGLANG names the folders that have it and what it imports."""

import json
import os
import subprocess
import sys

import pytest

from scripts.pages import ROOT

FOLDERS = os.environ.get("VISATTN_TEST_SGLANG", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="VISATTN_TEST_SGLANG names no folders with sglang and what it imports")
def test_layers_that_it_builds_equal_masked_dense():
    given = [sys.executable, "-m", "tests.support.sglang_wan", *FOLDERS.split(os.pathsep)]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    row = json.loads(done.stdout.splitlines()[0])
    assert row["hits"] == row["dense"] == 3 and row["dense_off"] <= 1e-6
    assert row["off"] <= 1e-5 < 1e-2 < row["change"]
