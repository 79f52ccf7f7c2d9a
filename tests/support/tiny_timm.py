"""Small models of timm's families, with weights at which attention matters."""

import importlib

import timm
import torch

from tests.golden.fill import fill_value

SAM2 = {"stages": (1, 2, 2, 1), "window_spec": (8, 4, 4, 2), "global_att_blocks": (4,)}
FOUR = {"depths": (1, 1, 1, 1)}
HEADS = {"embed_dims": (32, 32, 32, 32), "num_heads": (1, 2, 2, 2)}
MVIT = {"depths": (1, 2, 2, 1), "embed_dim": 16, "num_heads": 1, "stride_kv_adaptive": (2, 2)}
GEMMA = {"num_heads": 2, "head_dim": 32, "intermediate_size": 64, "position_embedding_size": 64}
# Name or class, its arguments, and the side of the image.
FAMILIES = {
    "hiera": ("hiera_tiny_224", {"img_size": 64, "embed_dim": 32, "stages": (1, 2, 2, 1)}, 64),
    "sam2": ("sam2_hiera_tiny", {"embed_dim": 32, **SAM2}, 64),
    "caformer": ("metaformer.MetaFormer", {**FOUR, "dims": (16, 32, 64, 96)}, 96),
    "pit": ("pit_ti_distilled_224", {"img_size": 64, "depth": (1, 1, 1)}, 64),
    "crossvit": ("crossvit_15_240", {"img_scale": (1.0, 1.0), "img_size": 48, "depth": ((1, 2, 0), (1, 1, 0))}, 48),
    "mobilevit": ("mobilevit_xxs", {}, 96),
    "efficientformer": (
        "efficientformer.EfficientFormer",
        {"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 16, 32), "num_vit": 1},
        224,
    ),
    "tnt": ("tnt_s_patch16_224", {"img_size": 64, "depth": 2}, 64),
    "visformer": ("visformer_tiny", {"img_size": 64, "depth": (1, 1, 1)}, 64),
    "volo": ("volo.VOLO", {"img_size": 64, "layers": (1, 1, 1, 1), **HEADS, "post_layers": ("ca", "ca")}, 64),
    "fastvit": ("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)}, 128),
    "levit": ("levit_128s", {"img_size": 64, "depth": (1, 1, 1)}, 64),
    "levit_conv": ("levit_conv_128s", {"img_size": 64, "depth": (1, 1, 1)}, 64),
    "nest": ("nest.Nest", {"img_size": 64, "depths": (1, 1, 1), "embed_dims": (32,) * 3, "num_heads": (1, 2, 2)}, 64),
    "twins": ("twins_svt_small", {"img_size": 64, "depths": (2, 2, 2, 1), "wss": (4, 4, 4, 2), **HEADS}, 64),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 96),
    "mvitv2": ("mvitv2.MultiScaleVit", {"img_size": 64}, 64),
    "mvitv2_cls": ("mvitv2.MultiScaleVit", {"img_size": 64, "use_cls_token": True}, 64),
    "shvit": ("shvit_s1", {}, 128),
    "iformer": ("iformer_t", {}, 96),
    "convit": ("convit_tiny", {"img_size": 64, "depth": 3, "local_up_to_layer": 1, "embed_dim": 8, "num_heads": 2}, 64),
    "csatv2": ("csatv2", {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}, 256),
    "pvt_v2_linear": ("pvt_v2_b2_li", {**FOUR, **HEADS}, 64),
    "tiny_vit": ("tiny_vit.TinyVit", {**FOUR, "window_sizes": (4, 4, 4, 4), **HEADS}, 128),
    "gcvit": ("gcvit.GlobalContextVit", {"img_size": 64, "window_size": (4, 4, 4, 2), "depths": (2, 1, 1, 1)}, 64),
    "swinv2_cr": ("swinv2_cr_tiny_224", {"img_size": 64, "window_size": 4, "embed_dim": 48, **FOUR}, 64),
    "efficientvit": (
        "efficientvit_msra.EfficientVitMsra",
        {"img_size": 128, "window_size": (8, 4, 4), "depth": (1, 1, 1)},
        128,
    ),
    "parallel": ("vit_base_patch16_xp_224", {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 2}, 64),
    "diff_parallel": ("vit_dpwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64),
    "diff": ("vit_dwee_patch16_reg1_gap_256", {"img_size": 64, "depth": 2}, 64),
    "gemma4": ("gemma4_vit.Gemma4VitEncoder", {"depth": 2, "embed_dim": 64, **GEMMA}, 96),
    "mobilenetv4": ("mobilenetv3.MobileNetV3", {}, 32),
}
# By record, the family (or model of `tests.models.test_swap`) that shows it: whole window, small one under its mask.
SHOWN = {
    "layers.attention.Attention": "vit_tiny_patch16_224",
    "layers.attention.AttentionRope": "vit_pe_core_tiny_patch16_384",
    "models.eva.EvaAttention": "eva02_tiny_patch14_224",
    "models.beit.Attention": "beit_base_patch16_224",
    "models.vision_transformer_relpos.RelPosAttention": "vit_relpos_small_patch16_224",
    "models.vision_transformer.ParallelScalingBlock": "parallel",
    "models.vision_transformer.DiffParallelScalingBlock": "diff_parallel",
    "layers.diff_attention.DiffAttention": "diff",
    "models.gemma4_vit.Gemma4Attention": "gemma4",
    "models.metaformer.Attention": "caformer",
    "models.tnt.Attention": "tnt",
    "models.efficientformer.Attention": "efficientformer",
    "models.hiera.MaskUnitAttention": "hiera",
    "models.hieradet_sam2.MultiScaleBlock": "sam2",
    "models.mvitv2.MultiScaleAttention": "mvitv2",
    "models.volo.Attention": "volo",
    "models.visformer.Attention": "visformer",
    "models.fastvit.Attention": "fastvit",
    "layers.attention2d.MultiQueryAttention2d": "mobilenetv4",
    "models.pvt_v2.Attention": "pvt_v2",
    "models.twins.GlobalSubSampleAttn": "twins",
    "models.twins.LocallyGroupedAttn": "twins",
    "models.nest.Attention": "nest",
    "models.tiny_vit.TinyVitBlock": "tiny_vit",
    "models.gcvit.GlobalContextVitBlock": "gcvit",
    "models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": "swinv2_cr",
    "models.efficientvit_msra.LocalWindowAttention": "efficientvit",
    "models.convit.MHSA": "convit",
    "models.shvit.SHSA": "shvit",
    "models.iformer.SHMA": "iformer",
    "models.levit.Attention": "levit",
}


def make(family, **kwargs):
    """A model of a family, and two images."""
    name, arguments, side = FAMILIES[family]
    arguments = {**arguments, **kwargs}
    if family == "caformer":
        meta = importlib.import_module("timm.models.metaformer")
        arguments["token_mixers"] = [meta.SepConv, meta.SepConv, meta.Attention, meta.Attention]
        arguments["norm_layers"] = [meta.LayerNorm2dNoBias] * 2 + [meta.LayerNormNoBias] * 2
    if family.startswith("mvitv2"):
        own = {name: arguments.pop(name) for name in ("use_cls_token",) if name in arguments}
        config = importlib.import_module("timm.models.mvitv2").MultiScaleVitCfg
        arguments["cfg"] = config(**{**MVIT, **own})
    if family == "mobilenetv4":
        decode = importlib.import_module("timm.models._efficientnet_builder").decode_arch_def
        stages = [
            ["uir_r1_a3_k3_s2_e2_c32"],
            ["mqa_r1_k3_h2_s1_v2_d16_c32", "mqa_r1_k3_h2_s1_d16_c32"],
            ["cn_r1_k1_s1_c32"],
        ]
        arguments["block_args"] = decode(stages)
    if "." in name:
        module, _, kind = name.partition(".")
        model = getattr(importlib.import_module(f"timm.models.{module}"), kind)(**arguments)
    else:
        model = timm.create_model(name, **arguments)
    torch.manual_seed(0)
    return randomise(model.eval()), torch.randn(2, 3, side, side)


def randomise(model):
    """The model with weights at which attention matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("logit_scale"):
                parameter.copy_(fill_value(name, parameter.shape))
    return model


def records_shown(name):
    """The records that a family, or a model of `tests.models.test_swap`, is there for."""
    return {f"timm.{record}" for record, by in SHOWN.items() if by == name}
