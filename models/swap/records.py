"""Which classes of timm visattn swaps, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from visattn import forwards
from visattn.dims import check_dims
from visattn.forwards import HOOK, HOOKED, while_patched
from visattn.given import said
from visattn.models.swap import hiera
from visattn.models.swap.graphs import as_node
from visattn.models.swap.grids import (
    CascadeWindow,
    GatedHead,
    GlobalContextBlock,
    NestAttention,
    Sam2Block,
    SwinCrBlock,
    TinyBlock,
    TwinsLocal,
    global_queries,
)
from visattn.models.swap.hiera import MaskUnits
from visattn.models.swap.maps import CoAtBlock, DaVitBlock, ParallelPartition, PartitionFirst, PartitionLast
from visattn.models.swap.mvit import PooledAttention, pools_apart
from visattn.models.swap.relative import BeitAttention, RelPosAttention
from visattn.models.swap.runtime import UNDONE
from visattn.models.swap.sam import SamBlock
from visattn.models.swap.sized import (
    FirstMap,
    FlattenedMap,
    LastMap,
    LevitAttention,
    OneHead,
    ReducedKeys,
    SharedKeys,
    reduced,
    strided,
)
from visattn.models.swap.tokens import RotaryAttention, TokenAttention
from visattn.models.swap.vits import (
    DiffParallelBlock,
    DiffTokens,
    FormerAttention,
    GemmaAttention,
    ParallelBlock,
    SequenceAttention,
    SplitAttention,
)
from visattn.models.swap.windows import SwinBlock, SwinV2Block
from visattn.patterns import Dense, Neighborhood, Pattern
from visattn.patterns.kinds import StaticPattern
from visattn.positions import check_positions
from visattn.registry import REGISTRY


@dataclass(frozen=True)
class Record:
    """How a class of timm is swapped.

    Attributes:
        mixin: What is mixed into the class.
        bias: Whether it has a relative position bias, which only neighborhoods carry.
        tokens: Whether it sees a sequence (and the model has to say where its tokens sit), or maps.
        models: Which models have it, for people.
        attention: Name of its attention module, if the class is a block around one.
        dense: Whether the module's own attention, or that of some modules, is dense on its map, so that it runs what a
            pattern covers, and where `auto` estimates that a pattern would take longer.
        apart: Whether the queries and keys of a module are on grids of their own; None where none has that.
        unfit: Why one module of the class cannot be swapped, "" if it can; None where all can.
        order: From the model and a module's path, how its tokens become a map; None where they come row by row.
        beside: Whether a module of the class at a path has nothing to do with the grid; None where all have.
    """

    mixin: type
    bias: bool
    tokens: bool
    models: str
    attention: str = ""
    dense: bool | Callable[[Any], bool] = False
    apart: Callable[[Any], bool] | None = None
    unfit: Callable[[Any], str] | None = None
    order: Callable[[nn.Module, str], Any] | None = None
    beside: Callable[[str], bool] | None = None


_OWN = {
    "timm.layers.attention.Attention": Record(TokenAttention, False, True, "ViT, DeiT, DeiT III, DINOv2, SigLIP, CLIP"),
    "timm.layers.attention.AttentionRope": Record(RotaryAttention, False, True, "rope ViTs, DINOv3, PE"),
    "timm.models.vision_transformer.Attention": Record(TokenAttention, False, True, "ViTs of older releases of timm"),
    "timm.models.eva.EvaAttention": Record(RotaryAttention, False, True, "EVA, EVA-02, DINOv3, rope ViTs"),
    "timm.models.beit.Attention": Record(BeitAttention, True, True, "BEiT, BEiT v2"),
    "timm.models.vision_transformer_relpos.RelPosAttention": Record(RelPosAttention, True, True, "vit_relpos"),
    "timm.models.swin_transformer.SwinTransformerBlock": Record(SwinBlock, True, False, "Swin, S3", "attn"),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": Record(SwinV2Block, True, False, "Swin v2", "attn"),
    "timm.models.maxxvit.PartitionAttentionCl": Record(
        PartitionLast, True, False, "MaxViT and MaxxViT: block attention, not grid attention", "attn"
    ),
    "timm.models.maxxvit.PartitionAttention2d": Record(PartitionFirst, True, False, "the same, channels first", "attn"),
    "timm.models.maxxvit.ParallelPartitionAttention": Record(
        ParallelPartition, True, False, "MaxViT with both at once: the block half", "attn_block"
    ),
    "timm.models.maxxvit.TransformerBlock2d": Record(CoAtBlock, True, False, "CoAtNet, CoAtNeXt", "attn"),
    "timm.models.davit.SpatialBlock": Record(DaVitBlock, False, False, "DaViT: spatial, not channel attention", "attn"),
    "timm.models.vision_transformer_sam.Block": Record(
        SamBlock, False, False, "SAM", "attn", dense=lambda block: block.window_size == 0
    ),
    "timm.models.vision_transformer.ParallelScalingBlock": Record(ParallelBlock, False, True, "ViT-22B's blocks"),
    "timm.models.vision_transformer.DiffParallelScalingBlock": Record(
        DiffParallelBlock, False, True, "the same with differential attention"
    ),
    "timm.layers.diff_attention.DiffAttention": Record(DiffTokens, False, True, "ViTs with differential attention"),
    "timm.models.gemma4_vit.Gemma4Attention": Record(GemmaAttention, False, True, "Gemma 4's image encoder"),
    "timm.models.metaformer.Attention": Record(SequenceAttention, False, True, "CAFormer and other MetaFormers"),
    "timm.models.tnt.Attention": Record(
        SplitAttention, False, True, "TNT: between patches, not within", beside=lambda path: path.endswith("attn_in")
    ),
    "timm.models.efficientformer.Attention": Record(FormerAttention, True, True, "EfficientFormer"),
    "timm.models.hiera.MaskUnitAttention": Record(
        MaskUnits,
        False,
        False,
        "Hiera",
        dense=lambda module: not module.use_mask_unit_attn,
        apart=lambda module: module.q_stride > 1,
        order=hiera.order_of,
    ),
    "timm.models.hieradet_sam2.MultiScaleBlock": Record(
        Sam2Block,
        False,
        False,
        "SAM 2's Hiera",
        "attn",
        dense=lambda block: not block.is_windowed,
        apart=lambda block: block.q_stride is not None,
    ),
    "timm.models.mvitv2.MultiScaleAttention": Record(PooledAttention, False, False, "MViT v2", apart=pools_apart),
    "timm.models.volo.Attention": Record(LastMap, False, False, "VOLO: not outlook attention", dense=True),
    "timm.models.visformer.Attention": Record(FirstMap, False, False, "Visformer", dense=True),
    "timm.models.fastvit.Attention": Record(FlattenedMap, False, False, "FastViT", dense=True),
    "timm.layers.attention2d.MultiQueryAttention2d": Record(
        SharedKeys, False, False, "MobileNetV4 hybrid", dense=True, apart=strided
    ),
    "timm.models.pvt_v2.Attention": Record(ReducedKeys, False, False, "PVT v2", dense=True, apart=reduced),
    "timm.models.twins.GlobalSubSampleAttn": Record(ReducedKeys, False, False, "Twins", dense=True, apart=reduced),
    "timm.models.twins.LocallyGroupedAttn": Record(TwinsLocal, False, False, "Twins: windows"),
    "timm.models.nest.Attention": Record(NestAttention, False, False, "Nest"),
    "timm.models.tiny_vit.TinyVitBlock": Record(TinyBlock, True, False, "TinyViT", "attn"),
    "timm.models.gcvit.GlobalContextVitBlock": Record(
        GlobalContextBlock, True, False, "GCViT: local queries", "attn", unfit=global_queries
    ),
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": Record(
        SwinCrBlock, True, False, "Swin v2 CR", "attn"
    ),
    "timm.models.efficientvit_msra.LocalWindowAttention": Record(CascadeWindow, True, False, "EfficientViT", "attn"),
    "timm.models.convit.MHSA": Record(SequenceAttention, False, True, "ConViT: the last blocks"),
    "timm.models.shvit.SHSA": Record(OneHead, False, False, "SHViT", dense=True),
    "timm.models.iformer.SHMA": Record(GatedHead, False, False, "iFormer", dense=lambda module: not module.window_size),
    "timm.models.levit.Attention": Record(LevitAttention, True, False, "LeViT", dense=True),
}


def _accept(name: str, record: Any) -> Record:
    if not isinstance(record, Record):
        raise ValueError(f"{said(record)} must be a visattn.models.swap.records.Record")
    if "." not in name:
        raise ValueError(f"{name!r} must be module and name of the class that is swapped, like timm.layers.Attention")
    return record


# Records by module and name of the class.
RECORDS = REGISTRY.declare("attention", _OWN, _accept)


def record_of(module: nn.Module) -> Record | None:
    """The record of a module's class or the nearest class it derives from, None if it is no attention known here."""
    # MaxViT's grid attention sees a few tokens of the whole map, each far from the next: no pattern is near to that.
    if getattr(module, "partition_block", None) is False:
        return None
    base = _base(type(module))
    return None if base is None else RECORDS[_path(base)]


def name_of_record(module: nn.Module) -> str:
    """Module and name of the class whose record a module has, which must have one."""
    base = _base(type(module))
    assert base is not None
    return _path(base)


def own_ways(module: nn.Module) -> str:
    """Why a module's attention is not that of the class its record is for, empty if it is."""
    base, record = _base(type(module)), record_of(module)
    assert base is not None and record is not None
    holder = getattr(module, record.attention) if record.attention else module
    if HOOK in module.__dict__ or HOOK in holder.__dict__:
        return HOOKED
    for name in _replaced(record.mixin, base):
        if name in module.__dict__ and not keeps_forward(module):
            return f"{name} of the module itself was replaced"
        definer = _definer(type(module), name, record.mixin)
        if definer not in base.__mro__:
            return f"{definer.__qualname__} has a {name} of its own"
    if record.attention:
        definer = _definer(type(holder), "forward", record.mixin)
        if ("forward" in holder.__dict__ and not keeps_forward(holder)) or _package(definer) != _package(base):
            return f"its {record.attention} has a forward of its own"
    return ""


def keeps_forward(module: nn.Module) -> bool:
    """Whether a module has the forward of its class among its attributes, where accelerate's hooks leave it."""
    record = record_of(module)
    kinds = [type(module), *([] if record is None else [swapped_class(type(module), record.mixin)])]
    return forwards.keeps_forward(module, kinds)


def swapped_class(kind: type, mixin: type) -> type:
    """The class of a swapped module: the class itself if it is swapped, as one derived from a swapped class is."""
    return kind if issubclass(kind, mixin) else _mixed(kind, mixin)


@lru_cache(maxsize=64)
def _mixed(kind: type, mixin: type) -> type:
    own = {"__module__": __name__, "visattn_site": UNDONE, "__prepare_scriptable__": _refuse_script}
    made: Any = type(f"Swapped{kind.__name__}", (mixin, kind), own)
    made.forward = while_patched(made, as_node(made.forward))
    return made


def _refuse_script(self: Any) -> Any:
    """What torch.jit.script asks a module for before it reads its code."""
    if self.visattn_site is UNDONE:
        return self
    raise ValueError(
        f"torch.jit.script cannot read the attention of {self.visattn_site.path}, which runs a pattern: use "
        "torch.jit.trace, or remove() the handle first"
    )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _base(kind: type) -> type | None:
    """The nearest class with a record."""
    return next((base for base in kind.__mro__ if _path(base) in RECORDS), None)


def _replaced(mixin: type, base: type) -> list[str]:
    """The methods of a class that a mixin replaces."""
    ours = {name for kind in mixin.__mro__[:-1] for name in vars(kind)}
    return sorted(name for name in ours if not name.startswith("__") and callable(getattr(base, name, None)))


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _definer(kind: type, name: str, mixin: type) -> type:
    """The class that gives a class its method, those of a patch aside."""
    return next(
        base
        for base in kind.__mro__
        if name in vars(base) and not issubclass(mixin, base) and "visattn_site" not in vars(base)
    )


def check_fit(module: nn.Module, pattern: Pattern, name: str) -> None:
    """Raise a ValueError if a module of the model `name` cannot carry a pattern."""
    record = record_of(module)
    assert record is not None
    check_dims(pattern, 2, name)
    holder: Any = getattr(module, record.attention) if record.attention else module
    if record.bias and not isinstance(pattern, Neighborhood | Dense) and _has_bias(holder):
        raise ValueError(
            f"{pattern} cannot carry the relative position bias of {name}: use na(window=...), which can, or 'dense'"
        )
    positions = getattr(holder, "use_rel_pos", False) or getattr(holder, "rel_pos_type", "") == "spatial"
    if positions:
        check_positions(pattern, name)
    one_grid = not isinstance(pattern, StaticPattern) or not pattern.two_grids
    if record.apart is not None and record.apart(module) and one_grid:
        raise ValueError(
            f"{pattern} is for queries and keys of one grid, and a module of {name} has its keys on another: use na, "
            "clear, halo or 'dense', or layers=... that leave such modules out"
        )
    if record.mixin is SamBlock and getattr(module, "window_size", 0) and getattr(holder, "rope", None) is not None:
        raise ValueError(
            f"the rotary embedding of {name} is one of its windows, not of the map: leave them as they are"
        )


def _has_bias(holder: Any) -> bool:
    tables = ("relative_position_bias_table", "cpb_mlp", "rel_pos", "attention_biases", "meta_mlp")
    return any(getattr(holder, name, None) is not None for name in tables)
