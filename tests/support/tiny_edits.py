"""Tiny random image models that edit, whose keys are more than their queries, or that few use, and their inputs."""

import torch

from tests.support.tiny import noise, released, seeded


def _latents_and_text(batch, text):
    return {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, text, 16, seed=2),
        "timestep": torch.tensor([5.0] * batch),
    }


def joy_image(references=2, batch=2, text=5):
    model = seeded(
        released("JoyImageEditTransformer3DModel"),
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    # The target is the last image.
    latents = noise(batch, references + 1, 4, 1, 12, 16) if references else noise(batch, 4, 1, 12, 16)
    return model, _latents_and_text(batch, text) | {"hidden_states": latents}


def joy_image_plus(sizes=((6, 8), (6, 8)), text=5):
    """The references and texts of the samples differ, the targets where `sizes` do."""
    model = seeded(
        released("JoyImageEditPlusTransformer3DModel"),
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )
    shapes = [[(1, *sizes[0]), (1, 2, 3)], [(1, *sizes[1]), (1, 4, 2), (1, 1, 3)]]
    inputs = _latents_and_text(2, text) | {
        "hidden_states": noise(2, 60, 4, 1, 2, 2),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "shape_list": shapes,
    }
    return model, inputs


def lumina_next(batch=2):
    model = seeded(
        released("LuminaNextDiT2DModel"),
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    inputs = _latents_and_text(batch, 5) | {
        "encoder_mask": torch.tensor([[1, 1, 1, 0, 0]] + [[1] * 5] * (batch - 1)),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
        "cross_attention_kwargs": {"base_sequence_length": 16},
    }
    return model, inputs


def transformer2d(batch=2):
    import diffusers

    model = seeded(
        diffusers.Transformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        norm_num_groups=2,
    )
    return model, {"hidden_states": noise(batch, 16, 6, 8)}


def vq_diffusion(batch=2):
    import diffusers

    model = seeded(
        diffusers.Transformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=8,
        sample_size=7,
        num_vector_embeds=9,
        num_embeds_ada_norm=10,
    )
    inputs = {"hidden_states": torch.arange(49).expand(batch, -1) % 8, "timestep": torch.tensor(5)}
    return model, inputs | {"encoder_hidden_states": noise(batch, 5, 8)}


def amused(downsample=True, batch=2):
    import diffusers

    model = seeded(
        diffusers.UVit2DModel,
        hidden_size=32,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=20,
        codebook_size=16,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        downsample=downsample,
        upsample=downsample,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=16,
    )
    inputs = {
        "input_ids": torch.arange(12 * 16).reshape(1, 12, 16).expand(batch, -1, -1) % 16,
        "encoder_hidden_states": noise(batch, 5, 16, seed=2),
        "pooled_text_emb": noise(batch, 8, seed=3),
        "micro_conds": torch.ones(batch, 5),
    }
    return model, inputs


def prx(batch=2, text=5):
    model = seeded(
        released("PRXTransformer2DModel"),
        in_channels=4,
        context_in_dim=16,
        hidden_size=32,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    # The last words of the first sample are padding.
    mask = torch.tensor([[1, 1, 1, 0, 0]] + [[1] * 5] * (batch - 1))
    return model, _latents_and_text(batch, text) | {"attention_mask": mask}


def nucleus(batch=2, text=5):
    model = seeded(
        released("NucleusMoEImageTransformer2DModel"),
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
    )
    inputs = _latents_and_text(batch, text) | {
        "hidden_states": noise(batch, 48, 4),
        "img_shapes": [(1, 6, 8)] * batch,
        "encoder_hidden_states_mask": torch.tensor([[True] * 3 + [False] * 2] + [[True] * 5] * (batch - 1)),
    }
    return model, inputs


def stable_cascade(batch=2, image=True):
    """The coarser grid is 6x5 of 13x11, rounded down."""
    import diffusers

    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    model = seeded(
        diffusers.StableCascadeUNet,
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(block, block),
        clip_text_in_channels=8,
        clip_text_pooled_in_channels=8,
        clip_image_in_channels=8,
        clip_seq=2,
        switch_level=(True,),
        dropout=(0.0, 0.0),
    )
    inputs = {
        "sample": noise(batch, 4, 13, 11),
        "timestep_ratio": torch.tensor([0.5] * batch),
        "clip_text_pooled": noise(batch, 1, 8, seed=2),
    }
    if image:
        inputs |= {"clip_text": noise(batch, 5, 8, seed=3), "clip_img": noise(batch, 1, 8, seed=4)}
    return model, inputs


def fibo2(lengths=(5, 5), references=((2, 3),), mask=True):
    """Gists of 2 to 6 tokens for texts of 2 to 6."""
    model = seeded(
        released("BriaFibo2Transformer2DModel"),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=6,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=6,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 32, 32),
    )
    text = max(lengths)
    valid = torch.arange(text) < torch.tensor(lengths)[:, None]
    inputs = {
        "hidden_states": noise(2, 4, 12, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, 2, text, 16, seed=2),
        "encoder_attention_mask": valid if mask else None,
        "context_latents": [noise(2, 4, 2 * h, 2 * w, seed=3 + i) for i, (h, w) in enumerate(references)] or None,
    }
    return model, inputs


def cosmos3(text=5, sound=4):
    grid = (3, 4, 6)
    model = seeded(
        released("Cosmos3OmniTransformer"),
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        sound_dim=4,
        sound_gen=True,
        vocab_size=16,
        rope_axes_dim=(4, 2, 2),
    )
    tokens = 3 * 4 * 6
    length = text + tokens + sound
    places = torch.arange(text, text + tokens)
    sounds = torch.arange(text + tokens, length)
    inputs = {
        "input_ids": torch.arange(text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": text,
        "sequence_length": length,
        "vision_tokens": [noise(1, 4, 3, 8, 12)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
        "sound_tokens": [noise(4, sound, seed=2)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": sounds,
        "sound_mse_loss_indexes": sounds,
        "sound_timesteps": torch.full((sound,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }
    return model, inputs


def qwen21(reference=(2, 4), text=5, batch=2):
    """A reference image of two slots in the middle of the text."""
    model = seeded(
        released("QwenImage21Transformer2DModel"),
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    slots = reference[0] * reference[1] // 4
    is_image = torch.zeros(text + slots + 12, dtype=torch.bool)
    is_image[2 : 2 + slots] = is_image[text + slots :] = True
    valid = torch.ones(batch, text + slots, dtype=torch.bool)
    valid[0, -1] = False
    inputs = {
        "hidden_states": noise(batch, 4 * slots + 48, 16),
        "encoder_hidden_states": noise(batch, text + slots, 16, seed=2),
        "timestep": torch.tensor([0.5] * batch),
        "img_shapes": [[(1, *reference), (1, 6, 8)]] * batch,
        "img_mask": is_image.expand(batch, -1),
        "encoder_hidden_states_mask": valid,
    }
    return model, inputs


def omnigen(lengths=(5, 3)):
    """Texts of which the shorter ones are padded on the left; the pipeline's masks."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    model = seeded(
        released("OmniGenTransformer2DModel"),
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_layers=2,
        pad_token_id=0,
        vocab_size=16,
        pos_embed_max_size=16,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        time_step_dim=16,
    )
    collator, text = OmniGenCollator(pad_token_id=0, hidden_size=32), max(lengths)
    valid = (torch.arange(text) >= text - torch.tensor(lengths)[:, None]).long()
    mask, _ = collator.create_mask(valid, [48] * len(lengths))
    inputs = {
        "hidden_states": noise(len(lengths), 4, 12, 16),
        "timestep": torch.tensor([0.5] * len(lengths)),
        "input_ids": torch.arange(1, text + 1).expand(len(lengths), -1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": collator.create_position(valid, [48] * len(lengths)),
    }
    return model, inputs


EDITS = {
    "joy_image": (joy_image, 2, "na(window=3x3)"),
    "joy_image_plus": (joy_image_plus, 2, "na(window=3x3)"),
    "lumina_next": (lumina_next, 2, "na(window=3x3)"),
    "transformer2d": (transformer2d, 2, "na(window=3x3)"),
    "vq_diffusion": (vq_diffusion, 2, "na(window=3x3)"),
    "amused": (amused, 2, "na(window=3x3)"),
    "prx": (prx, 2, "na(window=3x3)"),
    "nucleus": (nucleus, 2, "na(window=3x3)"),
    "stable_cascade": (stable_cascade, 4, "na(window=3x3)"),
    "fibo2": (fibo2, 3, "na(window=3x3)"),
    "omnigen": (omnigen, 2, "na(window=3x3)"),
    "cosmos3": (cosmos3, 2, "na(window=3x3x3)"),
    "qwen21": (qwen21, 2, "na(window=3x3)"),
}
