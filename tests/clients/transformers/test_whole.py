"""Whole models around vision towers: text and heads run what they ran, the tower its pattern."""

import pytest

pytest.importorskip("transformers")

import torch
from transformers import (
    CLIPVisionConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import visattn
from tests.support.tiny_towers import IMAGE

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT |= {"intermediate_size": 32, "vocab_size": 100}


def llava():
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**IMAGE), image_token_index=99)
    ids = torch.tensor([[1, *[99] * 36, 2, 3]])
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48)}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 48, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    tokens = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    ids = torch.tensor([[1, 97, *[99] * 12, 96, 2]])
    given = {"input_ids": ids, "mm_token_type_ids": (ids == 99).long()}
    image = {"pixel_values": torch.randn(48, 96), "image_grid_thw": torch.tensor([[1, 6, 8]])}
    return Qwen2VLForConditionalGeneration(config), given | image


def depth_anything():
    inner = Dinov2Config(**IMAGE, out_indices=[1, 2], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "reassemble_hidden_size": 48, "patch_size": 8}
    config = DepthAnythingConfig(backbone_config=inner, **sizes, fusion_hidden_size=8, head_hidden_size=8)
    return DepthAnythingForDepthEstimation(config), {"pixel_values": torch.randn(1, 3, 48, 48)}


@pytest.mark.parametrize("make", [llava, qwen2_vl, depth_anything])
@torch.no_grad()
def test_only_the_tower_of_a_whole_model_is_patched(make):
    torch.manual_seed(0)
    model, x = make()
    model.eval()
    stock = model(**x)[0]
    with visattn.apply(model, "dense"):
        assert torch.equal(model(**x)[0], stock)
    with visattn.apply(model, "na(window=3)", backend="tiles", strict=True) as handle:
        assert not torch.equal(model(**x)[0], stock)
        sites = [site.site for site in handle.report().sites]
    assert len(sites) == 2 and not [site for site in sites if "language" in site]
    assert torch.equal(model(**x)[0], stock)
