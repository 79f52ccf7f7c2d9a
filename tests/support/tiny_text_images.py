"""Tiny random image models whose text is a stream of its own around the grid, and their inputs."""

import torch

from tests.support.tiny import noise, released, seeded


def _sizes(batch):
    return {
        "original_size": torch.tensor([[96.0, 128.0]] * batch),
        "target_size": torch.tensor([[96.0, 128.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
    }


def _latents_and_text(batch, text):
    return {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, text, 16, seed=2),
        "timestep": torch.tensor([5] * batch),
    }


def cogview4(batch=2, text=5):
    model = seeded(
        released("CogView4Transformer2DModel"),
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    return model, _latents_and_text(batch, text) | _sizes(batch)


def cogview3(batch=2, text=5):
    model = seeded(
        released("CogView3PlusTransformer2DModel"),
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return model, _latents_and_text(batch, text) | _sizes(batch)


def auraflow(batch=2, text=5):
    model = seeded(
        released("AuraFlowTransformer2DModel"),
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return model, _latents_and_text(batch, text) | {"timestep": torch.tensor([0.5] * batch)}


def ernie(batch=2, text=5):
    model = seeded(
        released("ErnieImageTransformer2DModel"),
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = _latents_and_text(batch, text)
    inputs["text_bth"] = inputs.pop("encoder_hidden_states")
    # The last words of the first sample are padding.
    return model, inputs | {"text_lens": torch.tensor([3] + [text] * (batch - 1))}


def glm_image(batch=1, text=5):
    model = seeded(
        released("GlmImageTransformer2DModel"),
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=8,
    )
    sizes = {name: value for name, value in _sizes(batch).items() if name != "original_size"}
    prior = {"prior_token_id": torch.arange(48)[None] % 8, "prior_token_drop": torch.tensor([False] * batch)}
    return model, _latents_and_text(batch, text) | sizes | prior


def krea2(batch=2, text=5):
    model = seeded(
        released("Krea2Transformer2DModel"),
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": noise(batch, 48, 4),
        "encoder_hidden_states": noise(batch, text, 3, 16, seed=2),
        "timestep": torch.tensor([0.5] * batch),
        "position_ids": released("Krea2Pipeline").prepare_position_ids(text, 6, 8, "cpu"),
        "encoder_attention_mask": torch.tensor([[True] * 3 + [False] * (text - 3), [True] * text])[:batch],
    }
    return model, inputs


def hunyuan_image(grid=(12, 16), glyphs=True):
    """With a second text (glyphs), whose valid tokens come before those of the first."""
    dims = len(grid)
    model = seeded(
        released("HunyuanImageTransformer2DModel"),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        patch_size=(2, 2) if dims == 2 else (1, 2, 2),
        text_embed_dim=16,
        text_embed_2_dim=8 if glyphs else None,
        rope_axes_dim=(8, 8) if dims == 2 else (4, 6, 6),
    )
    inputs = {
        "hidden_states": noise(1, 4, *grid),
        "encoder_hidden_states": noise(1, 5, 16, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([5.0]),
    }
    if glyphs:
        inputs |= {
            "encoder_hidden_states_2": noise(1, 4, 8, seed=3),
            "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]]),
        }
    return model, inputs


def hunyuan_image_refiner():
    return hunyuan_image((3, 8, 12), glyphs=False)


def flux3(batch=2, text=5):
    """With one reference image of 2x3 tokens."""
    kind = released("Flux3Transformer2DModel")
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids as flux3_image_ids

    model = seeded(
        kind,
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=8,
        mlp_ratio=1.0,
        axes_dims_rope=(4, 4, 4, 4),
    )
    inputs = {
        "hidden_states": noise(batch, 48, 4),
        "encoder_hidden_states": noise(batch, text, 16, seed=2),
        "timestep": torch.tensor([0.5] * batch),
        "img_ids": flux3_image_ids(6, 8, 0.5),
        "txt_ids": torch.zeros(text, 4),
        "image_cond_hidden_states": noise(batch, 6, 4, seed=3),
        "image_cond_ids": flux3_image_ids(2, 3, 0.5, -1),
    }
    return model, inputs


def ideogram4(lengths=(5, 5)):
    """Text of these lengths before the image, padded on the left to the longest."""
    model = seeded(
        released("Ideogram4Transformer2DModel"),
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=16,
        mrope_section=(4, 2, 2),
    )
    batch, longest = len(lengths), max(lengths)
    position_ids, segment_ids, indicator = released("Ideogram4Pipeline")._prepare_ids(lengths, 6, 8, longest, "cpu")
    inputs = {
        "hidden_states": noise(batch, longest + 48, 4),
        "timestep": torch.tensor([0.5] * batch),
        "encoder_hidden_states": noise(batch, longest + 48, 16, seed=2),
        "position_ids": position_ids,
        "segment_ids": segment_ids,
        "indicator": indicator,
    }
    return model, inputs


# Builder, number of calls of visual self-attention in a forward, and a sparse pattern.
TEXT_IMAGES = {
    "cogview4": (cogview4, 2, "na(window=3x3)"),
    "cogview3": (cogview3, 2, "na(window=3x3)"),
    "auraflow": (auraflow, 3, "na(window=3x3)"),
    "ernie": (ernie, 2, "na(window=3x3)"),
    "glm_image": (glm_image, 2, "na(window=3x3)"),
    "krea2": (krea2, 2, "na(window=3x3)"),
    "flux3": (flux3, 3, "na(window=3x3)"),
    "ideogram4": (ideogram4, 2, "na(window=3x3)"),
    "hunyuan_image": (hunyuan_image, 3, "na(window=3x3)"),
    "hunyuan_image_refiner": (hunyuan_image_refiner, 3, "na(window=3x3x3)"),
}
