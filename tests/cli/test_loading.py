"""Folders of pipelines that somebody has changed: what is wrong with them, in one line."""

import json
import shutil

import pytest

pytest.importorskip("diffusers")

import torch
from safetensors.torch import load_file, save_file

from visattn.pipelines.load import load_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "whole"
    load_pipeline("digits").save_pretrained(folder)
    return folder


def edited(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_a_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS)


def with_another_shape(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {min(tensors): torch.zeros(3)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: edited(folder / "model_index.json", _class_name="Nope"), "AttributeError: .*Nope"),
        (lambda folder: edited(folder / "model_index.json", _class_name=["x"]), "TypeError"),
        (lambda folder: edited(folder / "model_index.json", scheduler=3), "TypeError"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "TypeError"),
        (lambda folder: edited(folder / "transformer" / "config.json", num_layers="x"), "TypeError"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "weights"),
        (without_a_weight, r"the weights of transformer lack .*, so they are not those of its config\.json"),
        (with_another_shape, "shape"),
    ],
)
def test_what_is_wrong_with_a_folder(tmp_path, whole, change, why):
    folder = tmp_path / "changed"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(ValueError, match=f"cannot load the pipeline in .*changed: .*{why}"):
        load_pipeline(str(folder))
