"""A tiny random text-to-video model of the animoji model's class, with the shipped tokenizer and text encoder."""

import torch


def tiny_pixel_wan_text():
    from scripts.train.animoji_model import AnimojiModel, build_pipeline
    from scripts.train.emoji_captions import shipped_tokenizer

    torch.manual_seed(0)
    model = AnimojiModel(heads=1, layers=1, ffn=64).eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return build_pipeline(model, shipped_tokenizer())
