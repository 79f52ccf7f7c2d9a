"""What the routers of the calls that a handle shows learn from."""

from __future__ import annotations

import torch

from visattn.patterns import Gate
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.targets import router_losses
from visattn.watch import Watched


def losses_of_call(watched: Watched, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """`router_losses` of what a handle's `watch` shows, its mean over layouts; empty for patterns without scores.

    q and k are detached: only the pattern's own parameters learn from it.

    Args:
        watched: A call.
        temperature: As in `router_losses`.
    """
    pattern = watched.pattern
    if not isinstance(pattern, Gate | HybridPattern):
        return {}
    alone, found = len(watched.layouts) == 1, []
    for i, layout in enumerate(watched.layouts):
        some = slice(None) if alone else slice(i, i + 1)
        mask = None if watched.key_mask is None else watched.key_mask[some]
        given = watched.q[some].detach(), watched.k[some].detach(), layout, watched.parameters, mask, watched.scale
        found.append(router_losses(pattern, *given, temperature=temperature))
    return {name: torch.stack([each[name] for each in found]).mean() for name in (found[0] if found else ())}
