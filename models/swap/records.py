"""Which classes of timm visattn swaps, and how."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from visattn.models.swap.graphs import as_node
from visattn.models.swap.maps import CoAtBlock, DaVitBlock, ParallelPartition, PartitionFirst, PartitionLast
from visattn.models.swap.relative import BeitAttention, RelPosAttention
from visattn.models.swap.runtime import UNDONE
from visattn.models.swap.sam import SamBlock
from visattn.models.swap.tokens import RotaryAttention, TokenAttention
from visattn.models.swap.windows import SwinBlock, SwinV2Block
from visattn.patterns import ComposedPattern, Dense, Neighborhood, Pattern
from visattn.registry import REGISTRY
from visattn.schedule import check_dims


@dataclass(frozen=True)
class Record:
    """How a class of timm is swapped.

    Attributes:
        mixin: What is mixed into the class.
        bias: Whether it has a relative position bias, which only neighborhoods carry.
        tokens: Whether it sees a sequence (and the model has to say where its tokens sit), or maps.
        models: Which models have it, for people.
        attention: Name of its attention module, if the class is a block around one.
    """

    mixin: type
    bias: bool
    tokens: bool
    models: str
    attention: str = ""


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
    "timm.models.vision_transformer_sam.Block": Record(SamBlock, False, False, "SAM", "attn"),
}


def _accept(name: str, record: Any) -> Record:
    if not isinstance(record, Record):
        raise ValueError(f"{record!r} must be a visattn.models.swap.records.Record")
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


def own_ways(module: nn.Module) -> str:
    """Why a module's attention is not that of the class its record is for, empty if it is."""
    base, record = _base(type(module)), record_of(module)
    assert base is not None and record is not None
    for name in _replaced(record.mixin, base):
        if name in module.__dict__:
            return f"{name} of the module itself was replaced"
        definer = _definer(type(module), name, record.mixin)
        if definer not in base.__mro__:
            return f"{definer.__qualname__} has a {name} of its own"
    if record.attention:
        holder = getattr(module, record.attention)
        definer = _definer(type(holder), "forward", record.mixin)
        if "forward" in holder.__dict__ or _package(definer) != _package(base):
            return f"its {record.attention} has a forward of its own"
    return ""


def swapped_class(kind: type, mixin: type) -> type:
    """The class of a swapped module: the class itself if it is swapped, as one derived from a swapped class is."""
    return kind if issubclass(kind, mixin) else _mixed(kind, mixin)


@lru_cache(maxsize=64)
def _mixed(kind: type, mixin: type) -> type:
    own = {"__module__": __name__, "visattn_site": UNDONE}
    made = type(f"Swapped{kind.__name__}", (mixin, kind), own)
    made.forward = as_node(made.forward)  # type: ignore[attr-defined]
    return made


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
    if isinstance(pattern, ComposedPattern) and getattr(holder, "use_rel_pos", False):
        raise ValueError(
            f"{pattern} has no pairs of tokens to which the position logits of {name} could be added: use a pattern "
            "that has, like na(window=...), or 'dense'"
        )
    if record.mixin is SamBlock and getattr(module, "window_size", 0) and getattr(holder, "rope", None) is not None:
        raise ValueError(
            f"the rotary embedding of {name} is one of its windows, not of the map: leave them as they are"
        )


def _has_bias(holder: Any) -> bool:
    table = getattr(holder, "relative_position_bias_table", None)
    return table is not None or hasattr(holder, "cpb_mlp") or getattr(holder, "rel_pos", None) is not None
