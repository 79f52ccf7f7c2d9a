"""Flow-Attention: linear attention with competition among keys (Flowformer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn.patterns.linear import LinearForm


@dataclass(frozen=True)
class Flow(LinearForm):
    """Linear attention of sigmoid features in which keys compete for what queries take in.

    Source: Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows" (ICML 2022), section 3.2, in the
    form of its vision code; the maths is with `visattn.kernels.linear.flow.flow_attention`. Dense tokens and grid are
    alike; tokens that the key mask hides take part in no sum, neither as keys nor as queries. The scale of
    `attention` is not used.

    Sums are float32 at least. Tested in bfloat16 and float16 with queries and keys up to 80 in absolute value.
    """

    name: ClassVar[str] = "flow"
