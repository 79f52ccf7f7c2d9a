"""Video model families."""

from __future__ import annotations

from typing import Any

from visattn.pipelines.families.base import Args, Family, Seen, patches


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-3:])))


WAN = Family(
    name="Wan 2.1 and 2.2",
    classes=("WanTransformer3DModel",),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_latents,
)

FAMILIES = (WAN,)
