"""Tiny models of transformers with random weights, one of each kind of vision tower."""

import importlib

import torch

from visattn import Layout

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
IMAGE = {**SIZES, "image_size": 48, "patch_size": 8}
GRID = Layout((6, 6))
ONE = Layout((6, 6), prefix=1)
VIDEO = {**SIZES, "image_size": 32, "patch_size": 8}

# Configuration, model, settings, and where the tokens of `inputs` sit.
TOWERS = {
    "vit": ("ViTConfig", "ViTModel", IMAGE, ONE),
    "vit_msn": ("ViTMSNConfig", "ViTMSNModel", IMAGE, ONE),
    "ijepa": ("IJepaConfig", "IJepaModel", IMAGE, GRID),
    "deit": ("DeiTConfig", "DeiTModel", IMAGE, Layout((6, 6), prefix=2)),
    "dinov2": ("Dinov2Config", "Dinov2Model", IMAGE, ONE),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {**IMAGE, "num_register_tokens": 3},
        Layout((6, 6), prefix=4),
    ),
    "dinov3_vit": (
        "DINOv3ViTConfig",
        "DINOv3ViTModel",
        {**IMAGE, "num_register_tokens": 3},
        Layout((6, 6), prefix=4),
    ),
    "tipsv2": (
        "Tipsv2VisionConfig",
        "Tipsv2VisionModel",
        {**IMAGE, "num_register_tokens": 2},
        Layout((6, 6), prefix=3),
    ),
    "pixio": ("PixioConfig", "PixioModel", {**IMAGE, "n_cls_tokens": 3}, Layout((6, 6), prefix=3)),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", IMAGE, ONE),
    "metaclip_2": ("MetaClip2VisionConfig", "MetaClip2VisionModel", IMAGE, ONE),
    "clipseg": ("CLIPSegVisionConfig", "CLIPSegVisionModel", IMAGE, ONE),
    "altclip": ("AltCLIPVisionConfig", "AltCLIPVisionModel", IMAGE, ONE),
    "chinese_clip": ("ChineseCLIPVisionConfig", "ChineseCLIPVisionModel", IMAGE, ONE),
    "owlvit": ("OwlViTVisionConfig", "OwlViTVisionModel", IMAGE, ONE),
    "owlv2": ("Owlv2VisionConfig", "Owlv2VisionModel", IMAGE, ONE),
    "mlcd": ("MLCDVisionConfig", "MLCDVisionModel", {**IMAGE, "num_key_value_groups": 1}, ONE),
    "blip_2": ("Blip2VisionConfig", "Blip2VisionModel", IMAGE, ONE),
    "instructblip": ("InstructBlipVisionConfig", "InstructBlipVisionModel", IMAGE, ONE),
    "kosmos2": ("Kosmos2VisionConfig", "Kosmos2VisionModel", IMAGE, ONE),
    "git": ("GitVisionConfig", "GitVisionModel", IMAGE, ONE),
    "internvl": (
        "InternVLVisionConfig",
        "InternVLVisionModel",
        {**IMAGE, "image_size": [48, 48], "patch_size": [8, 8]},
        ONE,
    ),
    "dpt": (
        "DPTConfig",
        "DPTModel",
        {**IMAGE, "is_hybrid": False, "backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8]},
        ONE,
    ),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", IMAGE, GRID),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", {**SIZES, "patch_size": 4, "num_patches": 36}, GRID),
    "aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel", IMAGE, GRID),
    "idefics2": ("Idefics2VisionConfig", "Idefics2VisionTransformer", IMAGE, GRID),
    "idefics3": ("Idefics3VisionConfig", "Idefics3VisionTransformer", IMAGE, GRID),
    "smolvlm": ("SmolVLMVisionConfig", "SmolVLMVisionTransformer", IMAGE, GRID),
    "janus": ("JanusVisionConfig", "JanusVisionModel", {**IMAGE, "depth": 1}, GRID),
    "ovis2": ("Ovis2VisionConfig", "Ovis2VisionModel", {**IMAGE, "hidden_stride": 1, "vocab_size": 16}, GRID),
    "yolos": (
        "YolosConfig",
        "YolosModel",
        {**IMAGE, "image_size": [48, 48], "num_detection_tokens": 5},
        Layout((6, 6), prefix=1, suffix=5),
    ),
    "videomae": ("VideoMAEConfig", "VideoMAEModel", {**VIDEO, "num_frames": 6, "tubelet_size": 2}, Layout((3, 4, 4))),
    "vivit": (
        "VivitConfig",
        "VivitModel",
        {**VIDEO, "num_frames": 6, "tubelet_size": [2, 8, 8]},
        Layout((3, 4, 4), prefix=1),
    ),
    "timesformer": ("TimesformerConfig", "TimesformerModel", {**VIDEO, "num_frames": 3}, Layout((4, 4), prefix=1)),
    "vjepa2": (
        "VJEPA2Config",
        "VJEPA2Model",
        {
            **SIZES,
            "crop_size": 32,
            "patch_size": 8,
            "frames_per_clip": 6,
            "tubelet_size": 2,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 1,
            "num_pooler_layers": 1,
        },
        Layout((3, 4, 4)),
    ),
    "sam2": (
        "Sam2HieraDetConfig",
        "Sam2HieraDetModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "image_size": [96, 96],
            "patch_kernel_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "window_positional_embedding_background_size": [4, 4],
            "blocks_per_stage": [1, 2, 2, 1],
            "embed_dim_per_stage": [16, 32, 48, 64],
            "num_attention_heads_per_stage": [1, 2, 2, 2],
            "window_size_per_stage": [4, 4, 2, 2],
            "global_attention_blocks": [2, 4],
            "num_query_pool_stages": 2,
        },
        Layout((12, 12)),
    ),
    "sam": (
        "SamVisionConfig",
        "SamVisionModel",
        {
            **IMAGE,
            "window_size": 2,
            "num_hidden_layers": 3,
            "global_attn_indexes": [0, 2],
            "num_pos_feats": 12,
            "output_channels": 16,
            "mlp_dim": 32,
        },
        GRID,
    ),
    "hiera": (
        "HieraConfig",
        "HieraModel",
        {
            "embed_dim": 16,
            "image_size": [96, 96],
            "patch_stride": [4, 4],
            "depths": [1, 1, 2, 2],
            "num_heads": [1, 2, 2, 4],
            "masked_unit_size": [8, 8],
            "masked_unit_attention": [True, True, False, False],
        },
        Layout((6, 6)),
    ),
    "swinv2": (
        "Swinv2Config",
        "Swinv2Model",
        {
            "image_size": 48,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            # One window holds the map, so that the model's own attention can be told what a pattern hides.
            "window_size": 12,
        },
        Layout((12, 12)),
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerModel",
        {
            "depths": [1, 1, 1, 1],
            "sr_ratios": [4, 2, 1, 1],
            "hidden_sizes": [16, 16, 32, 32],
            "num_attention_heads": [1, 1, 2, 2],
        },
        Layout((6, 6)),
    ),
    "sam3": (
        "Sam3ViTConfig",
        "Sam3ViTModel",
        {**IMAGE, "window_size": 3, "global_attn_indexes": [1], "pretrain_image_size": 48},
        GRID,
    ),
    "qwen2_vl": (
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        {"depth": 2, "embed_dim": 48, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4},
        Layout((6, 8)),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        Layout((6, 8)),
    ),
    "qwen3_vl": (
        "Qwen3VLVisionConfig",
        "Qwen3VLVisionModel",
        {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        Layout((6, 8)),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeVisionConfig",
        "Qwen3VLMoeVisionModel",
        {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        Layout((6, 8)),
    ),
    "qwen3_5": (
        "Qwen3_5VisionConfig",
        "Qwen3_5VisionModel",
        {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
        },
        Layout((6, 8)),
    ),
    "glm4v": (
        "Glm4vVisionConfig",
        "Glm4vVisionModel",
        {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "patch_size": 4,
            "image_size": 32,
        },
        Layout((6, 8)),
    ),
}
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")


def make(folder, **more):
    """A model in evaluation mode, with weights at which attention matters."""
    config, model, settings, _ = TOWERS[folder]
    home = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    made = getattr(home, model)(getattr(home, config)(**{**settings, **more})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                spread = 1.5 / parameter[0].numel() ** 0.5
                parameter.normal_(0, spread, generator=generator)
    return made


def inputs(folder):
    """Arguments of its forward."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    layout = TOWERS[folder][3]
    if folder in PACKED:
        # GLM-4V counts its frames among the images.
        grid = [[1, 6, 8], [1, 8, 6], [1, 8, 6]] if folder == "glm4v" else [[1, 6, 8], [2, 8, 6]]
        return {"hidden_states": draw(3 * 48, 3 * 2 * 16), "grid_thw": torch.tensor(grid)}
    if folder == "siglip2":
        return {
            "pixel_values": draw(2, 36, 48),
            "pixel_attention_mask": torch.ones(2, 36),
            "spatial_shapes": torch.tensor([[6, 6], [6, 6]]),
        }
    if layout.dims == 3:
        return {"pixel_values_videos" if folder == "vjepa2" else "pixel_values": draw(2, 6, 3, 32, 32)}
    if folder == "timesformer":
        return {"pixel_values": draw(2, 3, 3, 32, 32)}
    if folder in ("sam2", "segformer", "hiera"):
        return {"pixel_values": draw(2, 3, 96, 96)}
    found = {"pixel_values": draw(2, 3, 48, 48)}
    if folder in ("idefics2", "idefics3", "smolvlm"):
        found["patch_attention_mask"] = torch.ones(2, 6, 6, dtype=torch.bool)
    return found


def first(output):
    """The tensor that a forward gives first."""
    return output if isinstance(output, torch.Tensor) else output[0]
