"""The same inside a real ComfyUI, where VISATTN_COMFYUI names its checkout (and VISATTN_COMFYUI_PYTHON its Python)."""

import json
import subprocess

import pytest
from safetensors.torch import load_file

from tests.support.comfy_real import KINDS
from tests.support.comfy_server import CHECKOUT, PYTHON, ROOT, environment, graph, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="VISATTN_COMFYUI names no checkout of ComfyUI"),
]


def test_sampled_models_equal_masked_dense_and_the_node_leaves_no_trace():
    command = [PYTHON, "-m", "tests.support.comfy_real", CHECKOUT]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = {row["kind"]: row for row in found}
    assert set(rows) == set(KINDS)
    for kind, row in rows.items():
        assert row["off"] <= 5e-6 < 1e-3 < row["change"] and row["undone"] and row["hits"] >= 6, (kind, row)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("comfy")) as running:
        yield running


def latents(server, history):
    """The latents that a workflow saved."""
    (saved,) = history["outputs"]["7"]["latents"]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def test_a_workflow_runs_reports_and_is_undone(server):
    dense, sparse, again = (latents(server, server.run(graph(sparse=on))) for on in (False, True, False))
    assert (sparse - dense).abs().max() > 1e-3 and (again == dense).all()
    history = server.run(graph(kind="wan", pattern="na(window=3x3x3)"))
    (text,) = history["outputs"]["5"]["text"]
    assert "2 of 2 attention modules ran a pattern: 6 calls" in text
    assert history["outputs"]["6"]["images"]


def test_mistakes_stand_at_their_node(server):
    answer = server.run(graph(pattern="na(windw=3)"))
    (error,) = answer["node_errors"]["2"]["errors"]
    assert "unknown parameter" in error["details"] or "windw" in error["details"]
    history = server.run(graph(kind="wan", pattern="na(window=3x3)"))
    ((_, failed),) = [each for each in history["status"]["messages"] if each[0] == "execution_error"]
    assert failed["node_type"] == "VisattnSparseAttention"
    assert "the tokens of Wan 2.1 and 2.2 are a (frames, height, width) grid" in failed["exception_message"]
