"""Tiny random world models, and their inputs."""

import torch

from tests.support.tiny import noise, released, seeded


def sana_wm(valid=(1, 1, 1)):
    """Layers 2 and 4 have softmax attention, each in a branch of its own for the camera."""
    model = seeded(
        released("SanaWMTransformer3DModel"),
        in_channels=4,
        num_layers=4,
        hidden_size=48,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=24,
        chunk_plucker_channels=6,
        caption_channels=16,
    )
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([6.0, 6.0, 3.0, 2.0])])
    inputs = {
        "hidden_states": noise(1, 4, 3, 6, 4),
        "timestep": torch.full((1, 1, 3), 500.0),
        "encoder_hidden_states": noise(1, 1, 7, 16, seed=2),
        "encoder_attention_mask": torch.ones(1, 7),
        "camera_conditions": camera.repeat(1, 3, 1),
        "chunk_plucker": noise(1, 6, 3, 6, 4, seed=3),
    }
    if not all(valid):
        inputs["frame_valid_mask"] = torch.tensor([valid], dtype=torch.float32)
    return model, inputs


def sana_wm_refiner(rope_type="interleaved", frames=(7, 8, 9), cached=24):
    """A chunk in the middle of a long video; the cache holds a sink and refined frames."""
    model = seeded(
        released("SanaWMLTX2RefinerTransformer3DModel"),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=20,
        cross_attention_dim=40,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        rope_type=rope_type,
    )
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    def rope(positions, height):
        return model.build_rotary_emb_for_absolute_positions(1, positions, height, 4, torch.device("cpu"), 16.0)

    inputs = {
        "hidden_states": noise(1, 72, 4),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "timestep": torch.full((1, 72), 500.0),
        "video_rotary_emb": rope(list(frames), 6),
    }
    if cached:
        cache = SanaWMRefinerKVCache(2)
        cache.sink_pe = rope([2], 6)
        for i in range(2):
            layer = cache.get(i)
            layer.sink_k_pre, layer.sink_v = noise(1, 24, 40, seed=4 + i), noise(1, 24, 40, seed=6 + i)
            layer.store_history(noise(1, cached, 40, seed=8 + i), noise(1, cached, 40, seed=10 + i))
        inputs |= {"kv_cache": cache, "kv_cache_mode": "inject"}
    return model, inputs


WORLDS = {
    "sana_wm": (sana_wm, 4, "na(window=3x3x3)"),
    "sana_wm_refiner": (sana_wm_refiner, 2, "na(window=3x3x3)"),
}
