"""The emoji model before training, its scheduler, and the pipeline folder that the package ships."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from scripts.train.emoji_captions import VOCABULARY
from scripts.train.emoji_sources import SIDE
from visattn.pipelines.embedded.pixel_flux import COLORS, PixelFluxPipeline

PATCH = 4
HEAD_DIM = 64
SHIFT = 4.0  # at FULL tokens
FULL = (SIDE // PATCH) ** 2


class EmojiModel(nn.Module):
    """Transformer and text encoder, which are trained as one.

    Args:
        heads: Heads of 64 that both have.
        double: Double blocks of the transformer.
        single: Single blocks.
        text: Layers of the text encoder.
        vocabulary: Tokens that the text encoder knows.
    """

    def __init__(
        self, heads: int = 3, double: int = 3, single: int = 8, text: int = 3, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        width = heads * HEAD_DIM
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=COLORS * PATCH * PATCH,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=heads,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            axes_dims_rope=(8, 28, 28),
        )
        # It takes the settings of every configuration too, which its signature does not say.
        configure: Any = T5Config
        config = configure(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=HEAD_DIM,
            d_ff=width * 8 // 3,
            num_layers=text,
            num_heads=heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
            # 32 tokens gain nothing from a fused kernel, and few of those have a gradient for the position bias.
            attn_implementation="eager",
        )
        self.text_encoder = T5EncoderModel(config)
        _start(self.transformer)
        _start_text(self.text_encoder)


@torch.no_grad()
def _start(transformer: Any) -> None:
    """Blocks start as the identity and the output as zero, as in DiT."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedders = transformer.time_text_embed
    for linear in (*_linears(embedders.timestep_embedder), *_linears(embedders.text_embedder)):
        nn.init.normal_(linear.weight, std=0.02)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ".norm" in f".{name}":
            nn.init.zeros_(module.weight)
    nn.init.zeros_(transformer.proj_out.weight)


@torch.no_grad()
def _start_text(encoder: Any) -> None:
    nn.init.normal_(encoder.shared.weight, std=1.0)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.modules() if isinstance(each, nn.Linear)]


def time_shift(tokens: int) -> float:
    """Noise shift for a number of tokens: averages of whole pictures or clips are hidden alike at every size."""
    return SHIFT * math.sqrt(tokens / FULL)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Scheduler whose shift is SHIFT at FULL tokens and follows their number."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=round(math.log(SHIFT), 4),
        base_image_seq_len=FULL,
    )


def build_pipeline(model: EmojiModel, tokenizer: PreTrainedTokenizerFast) -> PixelFluxPipeline:
    """The model as a pipeline, without a progress bar."""
    pipeline = PixelFluxPipeline(model.transformer, build_scheduler(), model.text_encoder, tokenizer, SIDE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(weights: Mapping[str, torch.Tensor], model: EmojiModel, tokenizer: Any, folder: Path) -> int:
    """Writes weights as a float16 pipeline in diffusers' folder format; returns its size in bytes.

    Args:
        weights: State of an `EmojiModel` of the same shape as `model`.
        model: Gets the weights, in float16.
        tokenizer: Of the captions.
        folder: Replaced whole.
    """
    model.load_state_dict(weights)
    return save_pipeline(build_pipeline(model.half(), tokenizer), folder)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> int:
    """Writes a pipeline in diffusers' folder format, the folder replaced whole; returns its size in bytes."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    # transformers 5 saves its new name for the class; the old one loads everywhere.
    for file in (temporary / "model_index.json", temporary / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
