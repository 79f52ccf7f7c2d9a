"""The patterns that a text can name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from visattn.given import said
from visattn.patterns.base import Pattern
from visattn.registry import REGISTRY


def _accept(name: str, kind: Any) -> type[Pattern]:
    if not (isinstance(kind, type) and issubclass(kind, Pattern)):
        raise ValueError(f"{said(kind)} must be a class derived from visattn.patterns.Pattern")
    if not re.fullmatch(r"[a-z_]\w*", name) or kind.__dict__.get("name") != name or name != name.lower():
        own = said(kind.__dict__.get("name"))
        raise ValueError(
            f"{kind.__qualname__} must have the name that it is registered by, a word in small letters in the body of "
            f"its class, like name: ClassVar[str] = 'cross': it has {own}"
        )
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"{kind.__qualname__} must be a frozen dataclass: plans are kept by its parameters")
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"{kind.__qualname__} must define {', '.join(missing)}: docs/extending.md has a whole pattern")
    return kind


# Pattern classes by name.
KINDS = REGISTRY.declare(
    "pattern",
    {
        "dense": "visattn.patterns.dense:Dense",
        "na": "visattn.patterns.neighborhood:Neighborhood",
        "halo": "visattn.patterns.halo:Halo",
        "groups": "visattn.patterns.groups:Groups",
        "clear": "visattn.patterns.clear:Clear",
        "radial": "visattn.patterns.radial:Radial",
        "routing": "visattn.patterns.routing:Routing",
        "topk": "visattn.patterns.topk:TopK",
        "topp": "visattn.patterns.topp:TopP",
        "above": "visattn.patterns.above:Above",
        "verticalslash": "visattn.patterns.vertical_slash:VerticalSlash",
        "kmeans": "visattn.patterns.kmeans:KMeans",
        "lsh": "visattn.patterns.lsh:Lsh",
        "pruned": "visattn.patterns.pruned:Pruned",
        "centroids": "visattn.patterns.centroids:Centroids",
        "gate": "visattn.patterns.gate:Gate",
        "sla": "visattn.patterns.hybrid.sla:SLA",
        "sla2": "visattn.patterns.hybrid.sla2:SLA2",
        "vsa": "visattn.patterns.hybrid.vsa:VSA",
        "best": "visattn.patterns.perhead:Best",
        "perhead": "visattn.patterns.perhead:PerHead",
        "agent": "visattn.patterns.agent:Agent",
        "agentsd": "visattn.patterns.agent_sd:AgentSD",
        "linear": "visattn.patterns.linear:Linear",
        "flow": "visattn.patterns.flow:Flow",
        "mala": "visattn.patterns.mala:Mala",
        "wersa": "visattn.patterns.wersa:Wersa",
        "sparselinear": "visattn.patterns.sparse_linear:SparseLinear",
        "sigmoid": "visattn.patterns.sigmoid:Sigmoid",
        "clipped": "visattn.patterns.clipped:Clipped",
        "gated": "visattn.patterns.wrapped:Gated",
        "selective": "visattn.patterns.wrapped:Selective",
        "residual": "visattn.patterns.sharing:Residual",
        "broadcast": "visattn.patterns.sharing:Broadcast",
    },
    _accept,
)
