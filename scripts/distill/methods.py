"""Published methods as settings of a distillation: their pattern at a sparsity, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Where sparsity begins: half of the blocks are listed.
FIRST = 0.5


@dataclass(frozen=True)
class Method:
    """How a method is trained here.

    Attributes:
        pattern: Its pattern, {keep} for the share of blocks that are listed; {least} and {most} around it.
        source: Who published it, and what of theirs is otherwise here.
        options: Settings of scripts.distill.pipeline; others keep their defaults.
        anneals: Whether the share of listed blocks falls over the run, from `FIRST`.
    """

    pattern: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    anneals: bool = True

    def text(self, sparsity: float) -> str:
        """The pattern at a sparsity, with ranges where it anneals."""
        keep = round(1 - sparsity, 6)
        shares = {"keep": keep, "least": round(0.6 * keep, 6), "most": min(1.0, round(1.4 * keep, 6))}
        ranges = {
            name: f"{FIRST}..{share}" if self.anneals and share < FIRST else f"{share}"
            for name, share in shares.items()
        }
        return self.pattern.format(**ranges)

    def final(self, sparsity: float) -> str:
        """The pattern at a sparsity, as it is after the training."""
        return Method(self.pattern, self.source, anneals=False).text(sparsity)


# What a student gives matters more than the samples' own noise; layers are matched all along. Most of the run is at the
# final sparsity, and no layer by layer stage before it: with half of the blocks it has nothing to learn.
_COMMON = {"denoising": 0.1, "output": 1.0, "attention": 0.1, "errors": "step", "anneal": 0.25}
_ROUTED = _COMMON | {"stages": "router:0.1,all:0.9", "mass": 0.05, "temperature": "2..1", "own_lr": 5e-3}

METHODS: dict[str, Method] = {
    "topk": Method("topk(keep={keep})", "blocks by products of means, as SpargeAttn and VSA choose them", _COMMON),
    "sparge2": Method(
        "topp(p=0.3, least={least}, most={most})",
        "SpargeAttention2 (Zhang et al., 2026): a mask of top-k and top-p, trained by the distance of predictions "
        "alone; there p and k are fixed from the beginning",
        {"denoising": 0.0, "output": 1.0, "attention": 0.0, "errors": "step", "anneal": 0.25},
    ),
    "sla": Method(
        "sla(keep={keep})",
        "SLA (Zhang et al., 2025): softmax over the critical blocks, linear attention of all; there trained by the "
        "samples' own noise",
        _COMMON | {"own_lr": 5e-3},
    ),
    "sla2": Method(
        "sla2(keep={keep})",
        "SLA2 (2026): a router that learns, and a ratio that joins both branches to one softmax; there lists are soft "
        "while the router learns",
        _ROUTED,
    ),
    "vsa": Method(
        "vsa(keep={keep})",
        "VSA (Zhang et al., 2025): blocks chosen by the coarse branch, which a gate adds",
        _COMMON | {"own_lr": 5e-3, "mass": 0.02},
    ),
    "gate": Method(
        "gate(by=topk(keep={keep}))",
        "SeerAttention (Gao et al., 2024): a gate of pooled queries and keys learns the pooled map of its teacher; "
        "there the model stays as it is (--train none)",
        _ROUTED,
    ),
    "sparselinear": Method(
        "sparselinear(sparse=na(window=16x16, stride=8x8))",
        "the first form of SLA with a fixed list of tiles; its sparsity is that of the window",
        _COMMON | {"own_lr": 1e-2, "stages": "transfer:0.2,all:0.8"},
        anneals=False,
    ),
}


def settings_of(name: str, sparsity: float) -> dict[str, Any]:
    """Settings of a method at a sparsity.

    Raises:
        ValueError: If there is no such method, or the sparsity is no share.
    """
    if name not in METHODS:
        raise ValueError(f"--method {name!r} does not exist: {', '.join(METHODS)}")
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity {sparsity:g} must be the share of blocks that are not listed, between 0 and 1")
    method = METHODS[name]
    return method.options | {"pattern": method.text(sparsity)}
