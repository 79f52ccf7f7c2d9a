"""The nodes in the form that ComfyUI reads, and the folder that `visattn comfy` writes."""

import asyncio
import importlib
import re
import runpy
import sys
import tomllib

import pytest
import torch
from typer.testing import CliRunner

from scripts.pages import ROOT
from tests.support.comfy import ModelPatcher, WanModel, install_api
from visattn.cli import app
from visattn.clients.comfy.records import RECORDS


@pytest.fixture
def nodes(monkeypatch):
    install_api(monkeypatch)
    return importlib.import_module("visattn.clients.comfy.nodes")


def test_nodes_run_as_a_graph_would(nodes, tmp_path):
    sparse, tuned, report = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    schema = sparse.define_schema()
    assert schema.display_name == "Sparse Attention (visattn)" and schema.category == "model/patch"
    options = {field.name: field.options.get("default") for field in schema.inputs if field.name != "model"}
    assert options.pop("backend") is None
    given = {**options, "pattern": "na(window=3x3x3)", "backend": "tiles", "start_percent": 0.0, "min_tokens": 0}
    torch.manual_seed(0)
    patcher, x, text = ModelPatcher(WanModel().eval()), torch.randn(1, 4, 3, 8, 8), torch.randn(1, 7, 32)
    assert sparse.validate_inputs(given["pattern"]) is True and "windw" in sparse.validate_inputs("na(windw=3)")
    (model,) = sparse.execute(model=patcher, **given).args
    with torch.no_grad():
        found = model.sample(x, text)
    said = report.execute(model, {"samples": found})
    assert said.args[0]["samples"] is found and "2 of 2 attention modules ran a pattern" in said.args[1]
    assert said.ui == ("text", said.args[1]) and len(said.args) == len(report.define_schema().outputs) == 3
    image, empty = said.args[2], report.execute(patcher, {}).args
    assert image.shape[0] == 1 and image.shape[3] == 3 and 0 <= image.min() < image.max() <= 1
    assert image.shape[1] > 200 > empty[2].shape[1] and empty[1] == "this model has no Sparse Attention (visattn)"
    file = tmp_path / "tuned.json"
    file.write_text('{"0": "dense", "1-": "na(window=3x3x3)"}')
    assert tuned.validate_inputs(str(file)) is True and "does not exist" in tuned.validate_inputs("none.json")
    (model,) = tuned.execute(patcher, str(file), 0.0).args
    with torch.no_grad():
        model.sample(x, text)
    assert [site.hits + site.dense for site in nodes.run_of(model).report().sites] == [3, 3]
    assert {node.define_schema().node_id for node in (sparse, tuned, report)} == {
        "VisattnSparseAttention",
        "VisattnTunedAttention",
        "VisattnAttentionReport",
    }


def test_an_older_comfyui_is_told_what_the_nodes_need(monkeypatch):
    install_api(monkeypatch)
    monkeypatch.delattr(sys.modules["comfy_api.latest"], "io")
    with pytest.raises(ImportError, match=r"need ComfyUI 0\.3\.64 or newer, whose comfy_api\.latest has"):
        importlib.import_module("visattn.clients.comfy.nodes")


def test_the_folder_for_custom_nodes(tmp_path, monkeypatch):
    run = CliRunner()
    assert "has no custom_nodes" in str(run.invoke(app, ["comfy", str(tmp_path)]).exception)
    (tmp_path / "custom_nodes").mkdir()
    assert run.invoke(app, ["comfy", str(tmp_path)]).exit_code == 0
    folder = tmp_path / "custom_nodes" / "visattn"
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py", "pyproject.toml", "requirements.txt"]
    install_api(monkeypatch)
    nodes = importlib.import_module("visattn.clients.comfy.nodes")
    assert runpy.run_path(str(folder / "__init__.py"))["comfy_entrypoint"] is nodes.comfy_entrypoint
    found = tomllib.loads((folder / "pyproject.toml").read_text())
    assert "comfyui" not in found["project"]["name"].lower() and found["project"]["version"].count(".") == 2
    assert "pass --force" in str(run.invoke(app, ["comfy", str(tmp_path / "custom_nodes")]).exception)
    assert run.invoke(app, ["comfy", str(tmp_path / "custom_nodes"), "--force"]).exit_code == 0


def test_the_page_lists_every_record():
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE))
    assert rows == {record.name: record.models for record in RECORDS} and len(rows) == 8
