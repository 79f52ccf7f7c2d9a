"""Longer videos of a tiny pipeline: its folder, and runs on it."""

import torch
from safetensors.torch import load_file

from scripts.distill import extend_video
from scripts.train.moving_digits import LORA_FILE
from scripts.train.moving_digits_training import CLASS_TOKENS, build_model, build_scheduler
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline


def save_tiny(folder):
    """Write a pipeline of one layer that makes two frames of 8 x 8 pixels; returns the folder."""
    torch.manual_seed(0)
    model = build_model(1)
    with torch.no_grad():
        for value in model.parameters():
            # Layers that start at zero would hide every difference.
            value.add_(torch.randn(value.shape) * 0.03)
    PixelWanPipeline(model, build_scheduler(), CLASS_TOKENS, 2, 8).save_pretrained(folder)
    return folder


def words(folder, out, *more):
    given = ["--model", str(folder), "--out", str(out), "--frames", "4", "--steps", "4", "--batch", "1", "--rank", "2"]
    return [*given, "--threads", "1", *more]


def run(folder, out, *more):
    extend_video.main(words(folder, out, *more))
    return load_file(out / "lora" / LORA_FILE)
