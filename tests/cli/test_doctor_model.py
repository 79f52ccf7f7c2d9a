"""`visattn doctor --model`: what is known of a folder of diffusers or a name of timm."""

import json

import pytest
from typer.testing import CliRunner

from visattn.cli import app
from visattn.cli.doctor_model import examine

pytest.importorskip("diffusers")


def folder(path, config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 16,
    "patch_size": 2,
}


def test_a_model_that_is_known(tmp_path):
    (found,) = examine(str(folder(tmp_path, DIT)))
    assert found["family"] == "DiT" and found["why"] == ""
    assert found["sites"] == [f"transformer_blocks.{i}.attn1" for i in range(3)]
    assert found["grid"] == "8x8 at its usual 16x16 latents"
    text = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)]).stdout
    assert "sites   3, from transformer_blocks.0.attn1" in text and "8x8" in text


def test_names_that_other_commands_take_are_known_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (found,) = examine("emoji")
    assert found["class"] == "FluxTransformer2DModel" and len(found["sites"]) == 11
    pytest.importorskip("timm")
    assert examine("timm:vit_tiny_patch16_224") == examine("vit_tiny_patch16_224")


def test_the_parts_of_a_pipeline_and_a_class_without_a_record(tmp_path):
    folder(tmp_path / "transformer", DIT)
    prior = {"_class_name": "PriorTransformer", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
    folder(tmp_path / "prior", prior | {"embedding_dim": 8, "num_embeddings": 3})
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", DIT["_class_name"]]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"prior": ["diffusers", "PriorTransformer"]}))
    result = CliRunner().invoke(app, ["doctor", "--json", "--model", str(tmp_path)])
    known, unknown = json.loads(result.stdout)["models"]
    assert (known["part"], unknown["part"]) == ("transformer", "prior")
    assert unknown["sites"] == [] and "nothing to sparsify" in unknown["why"] and "pass layout=" in unknown["why"]


def test_a_name_of_timm():
    pytest.importorskip("timm")
    (found,) = examine("vit_tiny_patch16_224")
    assert len(found["sites"]) == 12 and found["grid"] == "14x14 at its usual size" and not found["why"]
    (found,) = examine("resnet18")
    assert not found["sites"] and found["why"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a mapping in JSON, and is a list"),
        ("[" * 10**5, "is not JSON"),
        ('{"_class_name": "Nothing"}', "names Nothing, which is no model of diffusers"),
        ('{"_class_name": [1]}', r"names \[1\], which is no model of diffusers"),
    ],
)
def test_what_is_no_model_is_an_error_that_says_why(tmp_path, config, why):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=why):
        examine(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="must be the folder of a pipeline"):
        examine(str(tmp_path))
    with pytest.raises(ValueError, match=r"gone does not exist: name .* or a model of timm"):
        examine(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"_class_name": "DiTTransformer2DModel", "norm_type": "x"},
            "diffusers cannot build DiTTransformer2DModel from",
        ),
        ({"model_type": "siglip"}, "that of a model of transformers .siglip.: load it, apply a pattern"),
    ],
)
def test_a_config_of_which_nothing_can_be_made(tmp_path, config, why):
    with pytest.raises(ValueError, match=why):
        examine(str(folder(tmp_path, config)))
