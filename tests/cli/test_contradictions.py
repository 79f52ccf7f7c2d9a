"""Options that another one leaves without meaning are refused by name, before anything is loaded or computed."""

import pytest

GRID = ("na(window=3x3)", "--grid", "8x8")
CASES = {
    ("show", "tuned.json", "--grid", "8x8", "--out", "a.png"): "--grid and --out are for the picture of a pattern",
    ("simulate", *GRID, "--gpus", "2", "--advise"): "--advise is not for times on GPUs",
    ("simulate", *GRID, "--gpu", "h100", "--tile", "4x4"): "--tile is not for times on GPUs",
    ("simulate", *GRID, "--gpu", "h100", "--link", "ib"): "--link is for --gpus",
    ("simulate", *GRID, "--heads", "2"): "--heads is for --gpu or --gpus",
    ("simulate", *GRID, "--volume", "32"): "--volume is for --advise",
    ("bench", *GRID, "--budget", "5"): "--budget is for --suite",
    ("bench", *GRID, "--patience", "nan"): "--patience nan must be above 0",
    ("bench", "--suite", "cab", "--budget", "-5"): "--budget -5 must be above 0",
    ("classify", "cat.png", "--model", "vit_tiny_patch16_224", "--queries", "8"): "--queries is for --probe",
    ("classify", "cats", "--model", "vit_tiny_patch16_224", "--probe", "--top", "3"): "--top is of the classes",
    ("maps", "calls.safetensors", "--prompt", "a cat", "--size", "64"): "--prompt and --size are for models that run",
    ("maps", "timm:vit_tiny_patch16_224", "cat.png", "--frames", "3"): "--frames is for pipelines",
    ("maps", "timm:vit_tiny_patch16_224", "cat.png", "--size", "64x32"): "--size 64x32: models of images take squares",
    ("maps", "timm:x", "cat.png", "--checkpoint", "a.pth", "--pretrained"): "both give weights",
    ("maps", "owner/name", "cat.png", "--checkpoint", "a.pth"): "--checkpoint is for models of timm",
    ("record", "--out", "a.safetensors", "--at", "x"): "--at 'x' must be whole numbers",
}


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_options_without_a_meaning_are_named(words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = command(*words)
    assert (status, out) == (2, "") and CASES[words] in error
    assert not list(tmp_path.iterdir())
