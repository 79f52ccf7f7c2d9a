"""The same on vLLM-Omni 0.30 with a vLLM for CPUs, where VISATTN_TEST_OMNI names the folder of both."""

import json
import os
import subprocess
import sys

import pytest

from scripts.pages import ROOT

FOLDER = os.environ.get("VISATTN_TEST_OMNI", "")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="VISATTN_TEST_OMNI names no folder with vllm_omni and vllm"),
]


def test_the_package_runs_every_case():
    code = f"import sys; sys.path.append({FOLDER!r}); from tests.support.omni_real import main; main()"
    given = [sys.executable, "-c", code, "tests.clients.vllm_omni.test_layer"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=300)
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran test_")]
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(ran) == 6


def test_its_wan_equals_itself_with_a_mask():
    given = [sys.executable, "-m", "tests.support.omni_wan", FOLDER]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    row = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert row["hits"] == row["dense"] == 3 and row["dense_off"] <= 1e-6
    assert row["off"] <= 5e-6 < 1e-3 < row["change"]
