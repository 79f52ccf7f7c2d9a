"""`visattn classify --probe`: what a frozen backbone knows, dense and under a pattern."""

import json

import timm
import torch
from PIL import Image
from safetensors.torch import save_file


def test_the_command_compares_dense_and_sparse(command, tmp_path):
    draw = torch.Generator().manual_seed(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            values = torch.rand(32, 32, 3, generator=draw) * 80 + 150 * label
            Image.fromarray(values.byte().numpy()).save(tmp_path / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    words = ["classify", tmp_path / "images", "--model", "vit_tiny_patch16_224", "--probe", "--size", 64, "--rate", 5]
    words += ["--checkpoint", tmp_path / "weights.safetensors", "--epochs", 20]
    status, said, error = command(*words, "--pattern", "na(window=3x3)", "--json")
    assert status == 0, error
    found = json.loads(said)
    assert (found["trained"], found["held_out"], found["classes"]) == (6, 6, 2)
    assert [each["pattern"] for each in found["probes"]] == ["dense", "na(window=3x3)"]
    assert all(each["accuracy"] > 0.8 for each in found["probes"])
    status, _, error = command(*words, "--classes", 3)
    assert status == 2 and "leave it out" in error
    words[1] = tmp_path / "images" / "dark" / "0.png"
    status, _, error = command(*words)
    assert status == 2 and "a folder with a subfolder of images for each class" in error
