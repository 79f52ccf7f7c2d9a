"""Attention modules whose projections can have other heads: where each of these is, told by names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from visattn.given import class_among
from visattn.selectors import Layers, SiteName, pick, selectors_of


class Slot(NamedTuple):
    """Where a layer is: a module, and the path of the layer in it."""

    owner: nn.Module
    path: str

    @property
    def layer(self) -> Any:
        """What is there."""
        return self.owner.get_submodule(self.path)

    def put(self, layer: nn.Module) -> None:
        """Put another layer there."""
        where, _, name = self.path.rpartition(".")
        setattr(self.owner.get_submodule(where), name, layer)


class Stream(NamedTuple):
    """The projections of one kind of tokens.

    Attributes:
        q: Of queries; of queries, keys and values where one layer makes all.
        k: Of keys, None where `q` makes them.
        v: Of values, alike.
        out: Of outputs, of which the first channels are those of the heads; None if there is none.
        norms: Norms of queries and keys over all heads.
    """

    q: Slot
    k: Slot | None
    v: Slot | None
    out: Slot | None
    norms: tuple[Slot, ...] = ()


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module.

    Attributes:
        name: Its path and layer.
        module: The module.
        heads: Query heads.
        head_dim: Channels of one.
        streams: Its projections, of grid tokens and of text.
        counts: Attributes that hold the number of heads, and those that hold the channels of all.
        rigid: Why it cannot have fewer query heads, empty if it can.
    """

    name: SiteName
    module: nn.Module
    heads: int
    head_dim: int
    streams: tuple[Stream, ...]
    counts: tuple[tuple[str, ...], tuple[str, ...]]
    rigid: str = ""


# Projections of grid tokens and of text in diffusers' classes: queries, keys, values, outputs, norms.
STREAMS = (
    ("to_q", "to_k", "to_v", ("to_out.0", "to_out"), ("norm_q", "norm_k")),
    ("add_q_proj", "add_k_proj", "add_v_proj", ("to_add_out",), ("norm_added_q", "norm_added_k")),
)

# What classes call attention to text, some of which do not say so.
CROSSING = ("attn2", "cross_attn")


def find_sites(model: nn.Module, layers: Layers) -> list[Site]:
    """The attention modules of a model that `layers` selects, in the order of its modules.

    Raises:
        ValueError: If there is none, or a selector names none.
    """
    modules = dict(model.named_modules())
    found = [site for path, m in modules.items() if (site := _fused(path, m) or _split(path, m, modules)) is not None]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module with heads that can be converted: pass a timm ViT or a "
            "model of diffusers (pipe.transformer or pipe.unet, not the pipeline), before apply()"
        )
    if layers is None:
        return found
    names = [site.name for site in found]
    chosen = pick(selectors_of(layers), names, list(dict.fromkeys(n.layer for n in names)), type(model).__name__)
    return [site for i, site in enumerate(found) if i in chosen]


def _linear(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.Linear)
    except AttributeError:
        return False


def _fused(path: str, module: Any) -> Site | None:
    """An attention of timm whose `qkv` makes all three."""
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int) or not (_linear(module, "qkv") and _linear(module, "proj")):
        return None
    inner = module.qkv.out_features // 3
    dim = getattr(module, "head_dim", None)
    if getattr(module, "q_bias", None) is not None or inner % heads or module.proj.in_features != inner:
        return None
    rigid = ""
    if not isinstance(getattr(module, "attn_dim", None), int) or dim != inner // heads:
        rigid = f"the forward of {type(module).__name__} takes the channels of its heads for those of its input"
    elif getattr(module, "gate", None) is not None or not isinstance(getattr(module, "norm", None), nn.Identity):
        rigid = "a gate or norm of its output has a weight for every channel"
    stream = Stream(Slot(module, "qkv"), None, None, Slot(module, "proj"))
    name = SiteName(path, path.rpartition(".")[0])
    return Site(name, module, heads, inner // heads, (stream,), (("num_heads",), ("attn_dim",)), rigid)


def _split(path: str, module: Any, modules: dict[str, nn.Module]) -> Site | None:
    """A self-attention of diffusers with a layer for each of the three."""
    heads = getattr(module, "heads", None)
    names = ("to_q", "to_k", "to_v")
    if not isinstance(heads, int) or not hasattr(module, "processor") or not all(_linear(module, n) for n in names):
        return None
    inner = module.to_q.out_features
    q, k, v = (getattr(module, n) for n in names)
    # Where text comes in by projections of its own, or keys have heads of their own already, nothing is ours to change.
    crossing = getattr(module, "is_cross_attention", False) or path.rpartition(".")[2] in CROSSING
    if crossing or inner % heads or not inner == k.out_features == v.out_features:
        return None
    if not q.in_features == k.in_features == v.in_features:
        return None
    streams, rigid = [], ""
    for q_name, k_name, v_name, outs, norms in STREAMS:
        if not _linear(module, k_name):
            continue
        if not _linear(module, q_name):
            # Keys of pictures beside those of text, which queries of the grid read.
            return None
        out = next((Slot(module, name) for name in outs if _linear(module, name)), None)
        if out is None and q_name == "to_q":
            out, rigid = _output_of_block(path, inner, modules)
        over_all = tuple(
            Slot(module, n) for n in norms if getattr(getattr(module, n, None), "weight", None) is not None
        )
        over_all = tuple(slot for slot in over_all if slot.layer.weight.numel() == inner and heads > 1)
        parts = [Slot(module, n) for n in (q_name, k_name, v_name)]
        streams.append(Stream(parts[0], parts[1], parts[2], out, over_all))
    counts = ("heads", "sliceable_head_dim"), ("inner_dim", "inner_kv_dim", "kv_inner_dim")
    name = SiteName(path, path.rpartition(".")[0])
    return Site(name, module, heads, inner // heads, tuple(streams), counts, rigid)


def _output_of_block(path: str, inner: int, modules: dict[str, nn.Module]) -> tuple[Slot | None, str]:
    """The projection of a block that takes the heads' channels before those of its MLP."""
    block = modules.get(path.rpartition(".")[0])
    if class_among(block, ["FluxSingleTransformerBlock"]) and _linear(block, "proj_out"):  # type: ignore[arg-type]
        assert block is not None
        return Slot(block, "proj_out"), ""
    return None, "it has no output projection of its own"
