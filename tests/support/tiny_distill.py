"""Distillation of a tiny digits pipeline: its folder, its samples, and runs on them."""

from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from scripts.distill import cache_samples
from scripts.distill import pipeline as distill
from tests.support.tiny_digits import tiny_transformer
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline


def tiny_pipeline_with_samples(folder):
    """Write a tiny pipeline to folder/model, and samples of it to folder/samples; returns the folder."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, base_image_seq_len=16)
    PixelDiTPipeline(tiny_transformer(), scheduler).save_pretrained(folder / "model")
    cache(folder, folder / "samples")
    return folder


def cache(folder, out, *more):
    words = ["--model", str(folder / "model"), "--labels", "0-2", "--count", "10", "--steps", "3", "--batch", "2"]
    cache_samples.main([*words, "--shard", "4", "--device", "cpu", "--out", str(out), *more])


def words(folder, out, *more):
    return [
        *("--model", str(folder / "model"), "--pattern", "na(window=3x3)", "--samples", str(folder / "samples")),
        *("--out", str(out), "--steps", "4", "--batch", "4", "--warmup", "1", "--lr", "0.01", "--cpu"),
        *("--log-every", "1", "--save-every", "1", *more),
    ]


def run(folder, out, *more):
    return load_file(distill.main(words(folder, out, *more)))
