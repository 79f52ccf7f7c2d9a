"""Attention of timm that has no record, each with the reason: for most there is nothing that a pattern could save.

`tests/models/test_every_attention.py` looks through the installed release: a class that attends is in the records,
inside of a block that is, or here.
"""

from __future__ import annotations

from torch import nn

_ONE = "it has one query, or a few learned ones, that gather the whole map"
_CHANNELS = "it attends between channels, not tokens: its cost is linear in the tokens already"
_LINEAR = "it is linear in the tokens already"
_GATE = "it weighs channels or places, and no token attends to another"
_HEADS = "it mixes the weights of its heads before and after the softmax (talking heads): no head has keys of its own"
_COARSE = "it attends on a map that was pooled to a few tokens"
_LOCAL = "its weights are of a small neighborhood already"
_QUERIES = "its queries are on a coarser grid than its keys, and it has a bias between the two"

# By module and name of the class.
REFUSED = {
    "timm.layers.attention2d.MultiQueryAttentionV2": "no model of timm has it",
    "timm.layers.attention_pool.AttentionPoolLatent": _ONE,
    "timm.layers.attention_pool.AttentionPoolPrr": _ONE,
    "timm.layers.attention_pool2d.AttentionPool2d": _ONE,
    "timm.layers.attention_pool2d.RotAttentionPool2d": _ONE,
    "timm.layers.bottleneck_attn.BottleneckAttn": "its position logits are of one map, by products with the queries",
    "timm.layers.cbam.ChannelAttn": _GATE,
    "timm.layers.cbam.LightChannelAttn": _GATE,
    "timm.layers.cbam.LightSpatialAttn": _GATE,
    "timm.layers.cbam.SpatialAttn": _GATE,
    "timm.layers.coord_attn.CoordAttn": _GATE,
    "timm.layers.coord_attn.EfficientLocalAttn": _GATE,
    "timm.layers.coord_attn.SimpleCoordAttn": _GATE,
    "timm.layers.coord_attn.StripAttn": _GATE,
    "timm.layers.eca.CircularEfficientChannelAttn": _GATE,
    "timm.layers.eca.EfficientChannelAttn": _GATE,
    "timm.layers.global_context.GlobalContext": _ONE,
    "timm.layers.halo_attn.HaloAttn": "it attends to blocks with halos already, with position logits of its own",
    "timm.layers.lambda_layer.LambdaLayer": _LINEAR,
    "timm.layers.non_local_attn.BatNonLocalAttn": _CHANNELS,
    "timm.layers.non_local_attn.BilinearAttnTransform": _CHANNELS,
    "timm.layers.non_local_attn.NonLocalAttn": "it is one of many gates (attn_layer='nl') that no model has by itself",
    "timm.layers.other_pool.SimPool1d": _ONE,
    "timm.layers.other_pool.SimPool2d": _ONE,
    "timm.layers.selective_kernel.SelectiveKernelAttn": _GATE,
    "timm.layers.split_attn.RadixSoftmax": _GATE,
    "timm.layers.split_attn.SplitAttn": _GATE,
    "timm.models.cait.ClassAttn": _ONE,
    "timm.models.cait.TalkingHeadAttn": _HEADS,
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.convit.GPSA": "it mixes its softmax with one of positions, by a gate",
    "timm.models.cpubone.ConvAttention": _COARSE,
    "timm.models.crossvit.CrossAttention": _ONE,
    "timm.models.csatv2.SpatialAttention": _GATE,
    "timm.models.csatv2.SpatialTransformerBlock": "its queries and keys are numbers, of a map that was pooled to 7 x 7",
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientformer_v2.Attention2d": _HEADS,
    "timm.models.efficientformer_v2.Attention2dDownsample": _QUERIES,
    "timm.models.efficientvim.EfficientViM": _LINEAR,
    "timm.models.efficientvim.EfficientViMDistilled": _LINEAR,
    "timm.models.efficientvim.HSMSSD": _LINEAR,
    "timm.models.efficientvit_mit.LiteMLA": _LINEAR,
    "timm.models.levit.AttentionDownsample": _QUERIES,
    "timm.models.lowformer.ConvAttention": _COARSE,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": "timm's own forward of it raises",
    "timm.models.nextvit.ConvAttention": "it is a convolution",
    "timm.models.nextvit.EfficientAttention": "its keys are means of neighbours in the sequence, which are of no grid",
    "timm.models.swiftformer.EfficientAdditiveAttention": _LINEAR,
    "timm.models.volo.ClassAttention": _ONE,
    "timm.models.volo.OutlookAttention": _LOCAL,
    "timm.models.xcit.ClassAttentionBlock": _ONE,
    "timm.models.xcit.XCA": _CHANNELS,
}


def refusal_of(module: nn.Module) -> str:
    """Why the attention of a module has no record, "" for other modules."""
    kind = type(module)
    return REFUSED.get(f"{kind.__module__}.{kind.__qualname__}", "")
