"""A tiny random pipeline of the digits model's kind: 16x16 pixels, 64 tokens, ten classes."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.support.tiny_digits import tiny_transformer
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline


def tiny_pixel_dit(layers):
    """The pipeline, the same at every call; its attention tells pictures apart."""
    transformer = tiny_transformer(side=16, layers=layers, classes=10)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PixelDiTPipeline(transformer, FlowMatchEulerDiscreteScheduler())
