"""Clipped softmax over the visible keys of any pattern that is a list of key tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from visattn.patterns.composition import Composition
from visattn.patterns.dense import Dense
from visattn.patterns.kinds import StaticPattern
from visattn.patterns.values import is_number, real_number

# What the paper calls alpha, if nothing else is said.
ALPHA = 4.0


@dataclass(frozen=True)
class Clipped(Composition):
    """out_i = sum_j clip((zeta - gamma) p_ij + gamma, 0, 1) v_j, p the softmax over the keys that `sparse` shows i.

    Weights can be exactly 0 and 1 at finite logits, so that training drives no logits, and with them no activations,
    to extremes: models trained so lose little in 8 bits. A query whose weights are all clipped to 0 gives zeros; that
    is how a head does nothing. Gradients of clipped weights are 0.

    Source: Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"
    (NeurIPS 2023), section 4.1. gamma is -alpha / n there with the length n of the sequence; here n is the number of
    keys that the query sees (pooled keys of clear count), so that a window clips as much as all keys do.

    Sums are float32 at least. Tested in bfloat16 with queries and keys up to 80 in absolute value. The scale of a
    model that was trained without clipping fits no longer: fine-tune or distil it.

    Attributes:
        sparse: Who sees whom, a pattern that is a list of key tiles.
        alpha: Weights below about alpha / n become 0; None for 4, the largest that the paper finds good (from 2 on).
        gamma: The lower end of the stretched softmax, at most 0, in the place of alpha; None for -alpha / n.
        zeta: Its upper end, at least 1.

    Raises:
        ValueError: If `sparse` is no list of tiles that is known without q and k, a number is out of its range, or both
            alpha and gamma are given.
    """

    sparse: StaticPattern = field(default_factory=Dense)
    alpha: float | None = None
    gamma: float | None = None
    zeta: float = 1.0

    name: ClassVar[str] = "clipped"

    def __post_init__(self) -> None:
        self.parse_sparse()
        if self.alpha is not None and self.gamma is not None:
            raise ValueError(
                f"alpha={self.alpha!r} and gamma={self.gamma!r} exclude each other: alpha stands for -gamma times the "
                "number of visible keys, leave one out"
            )
        if self.alpha is None and self.gamma is None:
            object.__setattr__(self, "alpha", ALPHA)
        self._set("alpha", "at least 0", lambda value: value >= 0)
        self._set("gamma", "at most 0", lambda value: value <= 0)
        self._set("zeta", "at least 1", lambda value: value >= 1)

    def _set(self, key: str, bound: str, fits: Callable[[Any], bool]) -> None:
        value = getattr(self, key)
        if value is None and key != "zeta":
            return
        if not is_number(value) or not fits(value):
            raise ValueError(f"{key}={value!r} must be a finite float32 number, {bound}")
        object.__setattr__(self, key, real_number(value))

    def __str__(self) -> str:
        parts = [f"sparse={self.sparse}"]
        if self.gamma is not None:
            parts.append(f"gamma={self.gamma!r}")
        elif self.alpha != ALPHA:
            parts.append(f"alpha={self.alpha!r}")
        if self.zeta != 1.0:
            parts.append(f"zeta={self.zeta!r}")
        return f"{self.name}({', '.join(parts)})"
