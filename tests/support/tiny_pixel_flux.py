"""A tiny random text-to-image model of the emoji model's class, with the shipped tokenizer."""

import torch

SIDE = 32  # pixels at which the position ids are one apart


def tiny_pixel_flux(heads=1):
    from transformers import PreTrainedTokenizerFast

    from scripts.train.emoji_model import EmojiModel, build_scheduler
    from visattn.pipelines.embedded import EMBEDDED
    from visattn.pipelines.embedded.pixel_flux import PixelFluxPipeline

    torch.manual_seed(0)
    model = EmojiModel(heads=heads, double=1, single=1, text=1).eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED["emoji"].folder / "tokenizer")
    pipeline = PixelFluxPipeline(model.transformer, build_scheduler(), model.text_encoder, tokenizer, SIDE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
