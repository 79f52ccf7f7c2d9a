"""Which vision towers of transformers visattn knows, and how their tokens are ordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visattn.clients.transformers import grids, swaps
from visattn.layout import Layout

# A count of tokens: a number, or the names of attributes of the configuration and numbers, to be added.
Count = tuple[int | str, ...]
NONE: Count = ()
CLASS: Count = (1,)


@dataclass(frozen=True)
class Record:
    """A vision tower.

    Attributes:
        anchor: Class of the module whose arguments tell where the tokens sit, after its folder in transformers.
        attention: Classes of its attention modules.
        models: Which models have it, for people.
        reader: Finds the tokens from these arguments.
        prefix: Tokens before the grid.
        suffix: Tokens after it.
        whole: Whether the anchor is the tower itself, not an embedding in it.
        told: Finds them from the arguments of an attention module, where these tell.
        skips: Whether an attention module has few keys already, so that a pattern has nothing to do: gets the module,
            the one around it and its place among the tower's blocks.
        refused: Why no pattern can run in it, empty if one can.
        swap: What is mixed into its attention classes, which call no attention implementation; None where they do.
        bias: Whether they have a relative position bias, which only neighborhoods carry.
    """

    anchor: str
    attention: tuple[str, ...]
    models: str
    reader: grids.Reader = grids.image
    prefix: Count = NONE
    suffix: Count = NONE
    whole: bool = False
    told: Callable[[grids.Args], Layout] | None = None
    skips: Callable[[Any, Any, int], bool] | None = None
    refused: str = ""
    swap: type | None = None
    bias: bool = False

    @property
    def folder(self) -> str:
        """The folder of transformers that it is in."""
        return self.anchor.partition(".")[0]

    def is_anchor(self, module: object) -> bool:
        """Whether a module is of the anchor's class."""
        return _has_class(type(module), self.folder, (self.anchor.partition(".")[2],))

    def is_attention(self, module: object) -> bool:
        """Whether a module is of one of the attention classes."""
        return self.has_attention(type(module))

    def has_attention(self, kind: type) -> bool:
        """Whether a class is one of the attention classes, or derived from one."""
        return _has_class(kind, self.folder, self.attention)

    def counts(self, config: Any) -> tuple[int, int]:
        """Tokens before and after the grid."""
        return _count(self.prefix, config), _count(self.suffix, config)


def _has_class(kind: type, folder: str, names: tuple[str, ...]) -> bool:
    home = f"transformers.models.{folder}."
    return any(base.__name__ in names and base.__module__.startswith(home) for base in kind.__mro__)


def _count(count: Count, config: Any) -> int:
    return sum(part if isinstance(part, int) else int(getattr(config, part)) for part in count)


def _in_window(module: Any, around: Any, block: int) -> bool:
    """Whether the block around an attention module attends in windows, or pools its queries."""
    return bool(around.window_size or getattr(around, "query_stride", None))


def _in_units(module: Any, around: Any, block: int) -> bool:
    """Whether a block attends in mask units, or pools its queries."""
    return bool(module.use_mask_unit_attn or module.query_stride > 1)


def _over_time(module: Any, around: Any, block: int) -> bool:
    """Whether a module attends from frame to frame at one place."""
    return module is getattr(around, "temporal_attention", None)


def _not_full(module: Any, around: Any, block: int) -> bool:
    """Whether a block is not listed as one of full attention."""
    return block not in module.config.fullatt_block_indexes


def _reduces(module: Any, around: Any, block: int) -> bool:
    """Whether the keys of a stage are fewer than its queries."""
    return module.sequence_reduction_ratio > 1


def _clip(folder: str, name: str, models: str) -> Record:
    return Record(f"{folder}.{name}VisionEmbeddings", (f"{name}Attention",), models, prefix=CLASS)


def _packed(folder: str, tower: str, attention: str, models: str, windows: bool = False) -> Record:
    skips = _not_full if windows else None
    return Record(f"{folder}.{tower}", (attention,), models, grids.frames, whole=True, skips=skips)


_MASKED = "it drops tokens at random, and the rest is no grid"

RECORDS: tuple[Record, ...] = (
    Record("vit.ViTEmbeddings", ("ViTAttention",), "ViT", prefix=CLASS),
    Record("vit_msn.ViTMSNEmbeddings", ("ViTMSNAttention",), "ViT-MSN", prefix=CLASS),
    Record("ijepa.IJepaEmbeddings", ("IJepaAttention",), "I-JEPA"),
    Record("deit.DeiTEmbeddings", ("DeiTAttention",), "DeiT", prefix=(2,)),
    Record("dinov2.Dinov2Embeddings", ("Dinov2Attention",), "DINOv2, Depth Anything", prefix=CLASS),
    Record(
        "dinov2_with_registers.Dinov2WithRegistersEmbeddings",
        ("Dinov2WithRegistersAttention",),
        "DINOv2 with registers",
        prefix=(1, "num_register_tokens"),
    ),
    Record("dinov3_vit.DINOv3ViTEmbeddings", ("DINOv3ViTAttention",), "DINOv3 ViT", prefix=(1, "num_register_tokens")),
    Record("tipsv2.Tipsv2VisionEmbeddings", ("Tipsv2VisionAttention",), "TIPSv2", prefix=(1, "num_register_tokens")),
    Record("pixio.PixioEmbeddings", ("PixioAttention",), "Pixio", prefix=("n_cls_tokens",)),
    _clip("clip", "CLIP", "CLIP, LLaVA"),
    _clip("metaclip_2", "MetaClip2", "MetaCLIP 2"),
    _clip("clipseg", "CLIPSeg", "CLIPSeg"),
    _clip("altclip", "AltCLIP", "AltCLIP"),
    Record("chinese_clip.ChineseCLIPVisionEmbeddings", ("ChineseCLIPVisionAttention",), "Chinese CLIP", prefix=CLASS),
    _clip("owlvit", "OwlViT", "OWL-ViT"),
    _clip("owlv2", "Owlv2", "OWLv2"),
    Record("mlcd.MLCDVisionEmbeddings", ("MLCDAttention",), "MLCD", prefix=CLASS),
    Record("blip_2.Blip2VisionEmbeddings", ("Blip2Attention",), "BLIP-2", prefix=CLASS),
    Record("instructblip.InstructBlipVisionEmbeddings", ("InstructBlipAttention",), "InstructBLIP", prefix=CLASS),
    Record("kosmos2.Kosmos2VisionEmbeddings", ("Kosmos2VisionAttention",), "Kosmos-2", prefix=CLASS),
    Record("git.GitVisionEmbeddings", ("GitVisionAttention",), "GIT", prefix=CLASS),
    Record("internvl.InternVLVisionEmbeddings", ("InternVLVisionAttention",), "InternVL", prefix=CLASS),
    Record("dpt.DPTViTEmbeddings", ("DPTSelfAttention",), "DPT", prefix=CLASS),
    Record("siglip.SiglipVisionEmbeddings", ("SiglipAttention",), "SigLIP, PaliGemma, Gemma 3"),
    Record("siglip2.Siglip2VisionEmbeddings", ("Siglip2Attention",), "SigLIP 2", grids.shapes),
    Record("aimv2.Aimv2VisionEmbeddings", ("Aimv2Attention",), "AIMv2"),
    Record("idefics2.Idefics2VisionEmbeddings", ("Idefics2VisionAttention",), "Idefics2"),
    Record("idefics3.Idefics3VisionEmbeddings", ("Idefics3VisionAttention",), "Idefics3"),
    Record("smolvlm.SmolVLMVisionEmbeddings", ("SmolVLMVisionAttention",), "SmolVLM"),
    Record("janus.JanusVisionEmbeddings", ("JanusVisionAttention",), "Janus"),
    Record("ovis2.Ovis2VisionEmbeddings", ("Ovis2VisionAttention",), "Ovis2"),
    Record("yolos.YolosEmbeddings", ("YolosSelfAttention",), "YOLOS", prefix=CLASS, suffix=("num_detection_tokens",)),
    Record("videomae.VideoMAEEmbeddings", ("VideoMAESelfAttention",), "VideoMAE", grids.video),
    Record("vivit.VivitEmbeddings", ("VivitAttention",), "ViViT", grids.video, CLASS),
    Record(
        "timesformer.TimesformerEmbeddings",
        ("TimeSformerAttention",),
        "TimeSformer: attention within a frame",
        grids.each_frame,
        CLASS,
        skips=_over_time,
        swap=swaps.TimeSformerAttention,
    ),
    Record("vjepa2.VJEPA2Embeddings", ("VJEPA2RopeAttention",), "V-JEPA 2: the encoder", grids.video),
    Record(
        "sam2.Sam2HieraDetModel",
        ("Sam2MultiScaleAttention",),
        "SAM 2: global blocks",
        grids.elsewhere,
        whole=True,
        told=grids.of_map,
        skips=_in_window,
    ),
    Record(
        "sam3.Sam3ViTModel",
        ("Sam3ViTRoPEAttention",),
        "SAM 3: global blocks",
        grids.elsewhere,
        whole=True,
        told=grids.of_map,
        skips=_in_window,
    ),
    Record(
        "sam.SamVisionEncoder",
        ("SamVisionAttention",),
        "SAM: global blocks",
        grids.elsewhere,
        whole=True,
        told=grids.of_map,
        skips=_in_window,
        swap=swaps.SamVisionAttention,
    ),
    Record(
        "hiera.HieraEmbeddings",
        ("HieraMaskUnitAttention",),
        "Hiera: global blocks that pool nothing",
        grids.pooled,
        skips=_in_units,
        swap=swaps.HieraMaskUnitAttention,
    ),
    Record(
        "swinv2.Swinv2Encoder",
        ("Swinv2Layer",),
        "Swin v2",
        grids.elsewhere,
        whole=True,
        told=grids.of_dimensions,
        swap=swaps.Swinv2Layer,
        bias=True,
    ),
    Record(
        "segformer.SegformerModel",
        ("SegformerAttention",),
        "SegFormer: stages without reduction",
        grids.elsewhere,
        whole=True,
        told=grids.of_sides,
        skips=_reduces,
    ),
    _packed("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "VisionAttention", "Qwen2-VL"),
    _packed(
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionAttention",
        "Qwen2.5-VL: full blocks",
        windows=True,
    ),
    _packed("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionAttention", "Qwen3-VL"),
    _packed("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionAttention", "Qwen3-VL with experts"),
    _packed("qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionAttention", "Qwen3.5"),
    _packed("glm4v", "Glm4vVisionModel", "Glm4vVisionAttention", "GLM-4V"),
    Record("vit_mae.ViTMAEEmbeddings", ("ViTMAEAttention",), "ViT-MAE", prefix=CLASS, refused=_MASKED),
)

_OWN_CODE = "its attention does not go through an attention implementation"
_WINDOWS = "its attention is in windows already"
# Why the attention of other folders stays as it is.
REFUSED = {
    "beit": "its position bias comes as a mask of all pairs",
    "cvt": f"{_OWN_CODE}, and its keys are fewer than its queries",
    "data2vec": f"{_OWN_CODE}, and it has a position bias",
    "dinat": f"{_OWN_CODE}, is a neighborhood already, and is built with natten before 0.20 only",
    "focalnet": "it has no attention",
    "levit": f"{_OWN_CODE}, and it has a position bias",
    "oneformer": f"{_OWN_CODE}",
    "pixtral": "it attends to several images in one row, told by a mask",
    "pvt": f"{_OWN_CODE}, and its keys are fewer than its queries",
    "pvt_v2": f"{_OWN_CODE}, and its keys are fewer than its queries",
    "swin": _WINDOWS,
    "swin2sr": f"{_OWN_CODE}, and is in windows already",
}
