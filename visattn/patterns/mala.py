"""MALA: linear attention whose weights keep the magnitude of the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn.patterns.linear import LinearForm


@dataclass(frozen=True)
class Mala(LinearForm):
    """Magnitude-aware linear attention of ELU + 1 features; weights of a query sum to 1 and may be negative.

    Source: Fan et al., "Rectifying Magnitude Neglect in Linear Attention" (ICCV 2025), section 3; the maths is with
    `visattn.kernels.linear.mala.mala_attention`. The backbone's own extras (rotary embedding after the features,
    local enhancement, output gate) belong to `visattn.models`, not here. A model whose queries and keys are rotated
    before attention (most diffusers models) gives rotated ones: features, z and product are then all of these.

    Sums are float32 at least. Tested in bfloat16 and float16 with queries and keys up to 80 in absolute value: z is a
    sum of positive features, so 1 / z is large only where every feature is tiny.
    """

    name: ClassVar[str] = "mala"
