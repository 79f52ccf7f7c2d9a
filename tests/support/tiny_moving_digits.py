"""A pipeline of the embedded video model's kind, so small that tests can run it."""

from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from tests.support.tiny import seeded
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline


def tiny_pipeline():
    transformer = seeded(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        text_dim=11 * 2,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = PixelWanPipeline(transformer, scheduler, class_tokens=2, num_frames=4, sample_size=16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
