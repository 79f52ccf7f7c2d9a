"""Tiny random diffusers pipelines that run end to end without a download."""

import string

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support import tiny_models
from tests.support.tiny_models import seeded


def tokenizer(length=16):
    """Characters as tokens, with a beginning and an end."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.printable[:95]])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    )


def clip(hidden, projection=False):
    config = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=128,
        max_position_embeddings=77,
        projection_dim=hidden,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return seeded(transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel, config)


def t5(width, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return seeded(getattr(transformers, f"{kind}EncoderModel"), config)


def image_vae(latents=4, channels=(4,)):
    return seeded(
        diffusers.AutoencoderKL,
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=latents,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
        sample_size=16,
    )


def flux():
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(1),
        text_encoder=clip(32),
        tokenizer=tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=tokenizer(),
        transformer=tiny_models.flux()[0],
    ), {"height": 12, "width": 16, "max_sequence_length": 8}


def stable_diffusion():
    return diffusers.StableDiffusionPipeline(
        vae=image_vae(channels=(4, 8)),
        text_encoder=clip(8),
        tokenizer=tokenizer(),
        unet=tiny_models.sd15()[0],
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ), {"height": 24, "width": 16}


def stable_diffusion3():
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_models.sd3()[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(4),
        text_encoder=clip(32, projection=True),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(32, projection=True),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
    ), {"height": 16, "width": 16, "max_sequence_length": 8}


def wan(second=False):
    vae = seeded(
        diffusers.AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )

    def transformer():
        return seeded(
            diffusers.WanTransformer3DModel,
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    return diffusers.WanPipeline(
        transformer=transformer(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=t5(32, "UMT5"),
        tokenizer=tokenizer(),
        transformer_2=transformer() if second else None,
        boundary_ratio=0.9 if second else None,
    ), {"height": 48, "width": 64, "num_frames": 9, "max_sequence_length": 8}


def hunyuan_video():
    llama = seeded(
        transformers.LlamaModel,
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    )
    vae = seeded(
        diffusers.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        mid_block_add_attention=True,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer(),
        transformer=tiny_models.hunyuan_video()[0],
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(8),
        tokenizer_2=tokenizer(),
    ), {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
    }


def cogvideox():
    vae = seeded(
        diffusers.AutoencoderKLCogVideoX,
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(8),
        vae=vae,
        transformer=tiny_models.cogvideox()[0],
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    ), {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 8}


# Builder, attention modules, forwards per step, and a sparse pattern.
PIPELINES = {
    "flux": (flux, 3, 1, "na(window=3x3)"),
    "stable_diffusion": (stable_diffusion, 4, 1, "na(window=3x3)"),
    "stable_diffusion3": (stable_diffusion3, 5, 1, "na(window=3x3)"),
    "wan": (wan, 2, 2, "na(window=3x3x3)"),
    "hunyuan_video": (hunyuan_video, 3, 1, "na(window=3x3x3)"),
    "cogvideox": (cogvideox, 2, 1, "na(window=3x3x3)"),
}


def generate(pipeline, options, steps=3):
    """What a pipeline makes of a prompt, from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipeline("a cat", num_inference_steps=steps, generator=generator, **{"output_type": "pt", **options})
    return out[0]
