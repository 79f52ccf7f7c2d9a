"""Tiny random video models whose clip stands beside its history, sound or several texts, and their inputs."""

import torch

from tests.support.tiny import noise, released, seeded


def _video(batch=1, text=7):
    return {
        "hidden_states": noise(batch, 4, 3, 12, 8),
        "timestep": torch.tensor([5] * batch),
        "encoder_hidden_states": noise(batch, text, 16, seed=2),
    }


def allegro():
    model = seeded(
        released("AllegroTransformer3DModel"),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=12,
        sample_width=8,
        sample_frames=3,
        caption_channels=16,
    )
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *frequencies, time, height, width = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (6, 4)), grid_size=(6, 4), temporal_size=3
    )
    places = torch.cartesian_prod(time.long(), height.long(), width.long()).T[:, None]
    return model, _video() | {"image_rotary_emb": (tuple(frequencies), tuple(places))}


def latte(frames=36, batch=1):
    """A frame has 36 tokens too: only the paths tell attention over frames from that within one."""
    model = seeded(
        released("LatteTransformer3DModel"),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=12,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
        caption_channels=16,
        video_length=frames,
    )
    return model, _video(batch) | {"hidden_states": noise(batch, 4, frames, 12, 12)}


ANYFLOW = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def anyflow():
    model = seeded(
        released("AnyFlowTransformer3DModel"),
        **ANYFLOW,
    )
    times = {"timestep": torch.full((1, 3), 5.0), "r_timestep": torch.full((1, 3), 2.0)}
    return model, _video() | times | {"hidden_states": noise(1, 3, 4, 12, 8)}


def anyflow_far():
    """The third of three chunks: the cache holds the first two, one of them compressed."""
    model = seeded(
        released("AnyFlowFARTransformer3DModel"),
        **ANYFLOW,
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=2,
        chunk_partition=(1, 2, 3),
    )
    compressed, full = 1 * 3 * 2, 2 * 6 * 4
    cache = [
        {
            "compressed_cache": noise(2, 1, 2, compressed, 12, seed=10 + i),
            "full_cache": noise(2, 1, 2, full, 12, seed=20 + i),
        }
        for i in range(2)
    ]
    inputs = _video() | {
        "hidden_states": noise(1, 3, 4, 12, 8),
        "timestep": torch.full((1, 3), 5.0),
        "r_timestep": torch.full((1, 3), 2.0),
        "chunk_partition": [1, 2, 3],
        "kv_cache": cache,
        "kv_cache_flag": {"is_cache_step": False, "num_cached_chunks": 2},
    }
    return model, inputs


def easyanimate(t5=3):
    model = seeded(
        released("EasyAnimateTransformer3DModel"),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=12,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        text_embed_dim_t5=16,
    )
    return model, _video() | ({"encoder_hidden_states_t5": noise(1, t5, 16, seed=3)} if t5 else {})


def kandinsky6(sound=5):
    model = seeded(
        released("Kandinsky6Transformer3DModel"),
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
    )
    inputs = _video() | {
        "hidden_states": noise(1, 3, 12, 8, 4),
        "pooled_projections": noise(1, 8, seed=3),
        "timestep": torch.tensor([5.0]),
    }
    return model, inputs | ({"audio_hidden_states": noise(1, sound, 4, seed=4)} if sound else {})


def helios(amplified=False):
    model = seeded(
        released("HeliosTransformer3DModel"),
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 6, 6),
        is_amplify_history=amplified,
    )
    inputs = _video()
    # 24 tokens of one frame, 6 of two and 2 of four.
    for name, frames, start in (("short", 1, 7), ("mid", 2, 5), ("long", 4, 1)):
        inputs[f"latents_history_{name}"] = noise(1, 4, frames, 12, 8, seed=start)
        inputs[f"indices_latents_history_{name}"] = torch.arange(start, start + frames)[None]
    inputs["indices_hidden_states"] = torch.arange(8, 11)[None]
    return model, inputs


def framepack(valid=(4, 7)):
    model = seeded(
        released("HunyuanVideoFramepackTransformer3DModel"),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    batch = len(valid)
    inputs = _video(batch) | {
        "encoder_attention_mask": torch.tensor([[1] * n + [0] * (7 - n) for n in valid]),
        "pooled_projections": noise(batch, 8, seed=3),
        "guidance": torch.tensor([6.0] * batch),
        "image_embeds": noise(batch, 3, 8, seed=4),
        "indices_latents": torch.arange(8, 11),
    }
    # 24 tokens of one frame, 2x3 of two and 2x1 of four.
    for name, frames, start in (("latents_clean", 1, 7), ("latents_history_2x", 2, 5), ("latents_history_4x", 4, 1)):
        inputs[name] = noise(batch, 4, frames, 12, 8, seed=start)
        inputs[f"indices_{name}"] = torch.arange(start, start + frames)
    return model, inputs


def motif(image=3, decoder=0):
    model = seeded(
        released("MotifVideoTransformer3DModel"),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=decoder,
        patch_size=2,
        text_embed_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    # The last words of the text are padding.
    inputs = _video() | {"encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3])}
    return model, inputs | ({"image_embeds": noise(1, image, 8, seed=3)} if image else {})


def minimax_layout(anchors, text, grid, sound):
    """Where the pipeline puts text, keyframes, sound of two channels and the video, as arguments of the forward."""
    released("MiniMaxH3Transformer3DModel")
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep as Step

    frames, height, width = grid
    tags = torch.ones(text, dtype=torch.long)
    sizes = (frames, 2 * height, 2 * width, sound, (1, 2, 2), 2, 2, 0, anchors)
    ids, tags, video, audio, words, *_ = Step.build_packed_sequence(tags, *sizes)
    return {
        "position_ids": ids,
        "token_tags": tags,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": words,
    }


def minimax_h3():
    model = seeded(
        released("MiniMaxH3Transformer3DModel"),
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        patch_size=(1, 2, 2),
        text_dim=16,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    )
    layout = minimax_layout(("first",), 5, (3, 6, 4), 4)
    inputs = {
        "hidden_states": noise(1, 24 + 72, 16),
        "audio_hidden_states": noise(1, 8, 4, seed=2),
        "encoder_hidden_states": noise(1, 5, 16, seed=3),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(5 + 24 + 8 + 72, dtype=torch.long),
    }
    return model, inputs | layout


CLIPS = {
    "allegro": (allegro, 2, "na(window=3x3x3)"),
    "latte": (latte, 2, "na(window=3x3)"),
    "anyflow": (anyflow, 2, "na(window=3x3x3)"),
    "anyflow_far": (anyflow_far, 2, "na(window=3x3x3)"),
    "easyanimate": (easyanimate, 2, "na(window=3x3x3)"),
    "kandinsky6": (kandinsky6, 2, "na(window=3x3x3)"),
    "helios": (helios, 2, "na(window=3x3x3)"),
    "framepack": (framepack, 3, "na(window=3x3x3)"),
    "motif": (motif, 3, "na(window=3x3x3)"),
    "motif_decoder": (lambda: motif(decoder=1), 3, "na(window=3x3x3)"),
    "minimax_h3": (minimax_h3, 2, "na(window=3x3x3)"),
}
