"""The same on vLLM-Omni 0.30 with a vLLM for CPUs, where VISATTN_TEST_OMNI names the folder that has them."""

import os
import subprocess
import sys

import pytest

from scripts.pages import ROOT

FOLDER = os.environ.get("VISATTN_TEST_OMNI", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="VISATTN_TEST_OMNI names no folder with vllm_omni and vllm")
def test_the_package_runs_every_case():
    code = f"import sys; sys.path.append({FOLDER!r}); from tests.support.omni_real import main; main()"
    given = [sys.executable, "-c", code, "tests.clients.vllm_omni.test_layer"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=300)
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran test_")]
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(ran) == 6
