"""timm: swapped attention, and the backbones of the papers.

Importing this registers the backbones with timm: `timm.create_model("nat_tiny")` and so on.
"""

from visattn.models.backbones import (
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    dinat_s,
    fit,
    flowformer,
    lrgt,
    mavit,
    moh_vit,
    nat,
)

__all__ = [
    "agent_deit",
    "agent_pvt",
    "agent_swin",
    "biformer",
    "dinat_s",
    "fit",
    "flowformer",
    "lrgt",
    "mavit",
    "moh_vit",
    "nat",
]
