"""The animoji model before training, and the pipeline folder that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from scripts.train.animoji_data import SIDE
from scripts.train.animoji_sources import FRAMES
from scripts.train.emoji_model import HEAD_DIM, PATCH, build_scheduler, save_pipeline
from visattn.pipelines.embedded import EMBEDDED
from visattn.pipelines.embedded.pixel_flux import COLORS
from visattn.pipelines.embedded.pixel_wan_text import PixelWanTextPipeline

FPS = 8


class AnimojiModel(nn.Module):
    """Transformer, and a text encoder that starts as the emoji model's.

    Args:
        heads: Heads of 64 of the transformer.
        layers: Its blocks.
        ffn: Width of their feed-forward layers.
    """

    def __init__(self, heads: int = 4, layers: int = 7, ffn: int = 1024) -> None:
        super().__init__()
        self.text_encoder = load_text_encoder()
        self.transformer = WanTransformer3DModel(
            patch_size=(1, PATCH, PATCH),
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            in_channels=COLORS,
            out_channels=COLORS,
            text_dim=self.text_encoder.config.d_model,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
            rope_max_seq_len=256,
        )
        _start(self.transformer)


@torch.no_grad()
def _start(transformer: Any) -> None:
    """Blocks start as the identity and the output as zero, as in DiT."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks = transformer.blocks
    for linear in (
        transformer.condition_embedder.time_proj,
        transformer.proj_out,
        *(b.attn2.to_out[0] for b in blocks),
    ):
        nn.init.zeros_(linear.weight)
    for table in (transformer.scale_shift_table, *(block.scale_shift_table for block in blocks)):
        nn.init.zeros_(table)


def load_text_encoder() -> Any:
    """The emoji model's text encoder, in float32."""
    folder = EMBEDDED["emoji"].folder / "text_encoder"
    encoder: Any = T5EncoderModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return encoder.float()


def build_pipeline(model: AnimojiModel, tokenizer: PreTrainedTokenizerFast) -> PixelWanTextPipeline:
    """The model as a pipeline, without a progress bar."""
    pipeline = PixelWanTextPipeline(
        model.transformer, build_scheduler(), model.text_encoder, tokenizer, FRAMES, SIDE, FPS
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(model: AnimojiModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Writes a model as a float16 pipeline in diffusers' folder format, replaced whole; returns its size in bytes."""
    return save_pipeline(build_pipeline(model.half(), tokenizer), folder)
