"""Linear attention: sums over all keys, in plain torch on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from visattn.dispatch import Backend, overhead
from visattn.kernels.linear.causal import TILE, causal_attention, decay_rates
from visattn.kernels.linear.features import elu_plus_one, features
from visattn.kernels.linear.flow import flow_attention
from visattn.kernels.linear.mala import mala_attention
from visattn.kernels.linear.plain import linear_attention
from visattn.kernels.linear.wersa import wersa_features
from visattn.kernels.triton.backend import on_gpu
from visattn.operands import repeated
from visattn.patterns import Flow, Linear, Mala, Wersa
from visattn.patterns.linear import LinearForm, feature_channels
from visattn.problem import Call, OtherKind, Problem, Support

if TYPE_CHECKING:
    from visattn.parallel.slabs import Slabs

# Time over that of dense attention's products, by operation count: the sums are memory-bound.
RATE = 4.0
# Features up to which the kernels in Triton run.
LARGEST = 256


class LinearBackend(Backend):
    """Runs linear, flow, mala and wersa, and nothing else; all others leave them to it."""

    name: ClassVar[str] = "linear"
    portable: ClassVar[bool] = True

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Linear forms without log-sum-exp."""
        if not isinstance(problem.pattern, LinearForm):
            return OtherKind(False, f"it runs linear, flow, mala and wersa only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "linear attention has no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """Two products of every token with a state of feature channels x head dim."""
        pattern = problem.pattern
        channels = problem.head_dim
        if isinstance(pattern, Linear):
            channels = feature_channels(pattern.feature, problem.head_dim)
        if isinstance(pattern, Wersa):
            channels = pattern.features
        if isinstance(pattern, Linear) and pattern.causal:
            # The products inside tiles, and reading the states of all before.
            channels += 2 * TILE
        pairs = float(problem.batch * problem.heads) * problem.layout.length * channels
        return RATE * pairs + overhead(problem, cpu_ms=0.3, cuda_us=100)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern = call.pattern
        if isinstance(pattern, Flow):
            return flow_attention(q, k, v, key_mask=call.key_mask), None
        if isinstance(pattern, Mala):
            mapped = elu_plus_one(q), elu_plus_one(k)
            return mala_attention(*mapped, v, scale=call.scale, key_mask=call.key_mask), None
        if isinstance(pattern, Wersa):
            mapped = wersa_features(q, k, pattern, call.layout, call.parameters, call.key_mask)
            v = repeated(v, q.shape[2])
            if on_gpu(q).ok and pattern.features <= LARGEST:
                return _of_features(*mapped, v), None
            return linear_attention(*mapped, v), None
        assert isinstance(pattern, Linear)
        if on_gpu(q).ok and feature_channels(pattern.feature, q.shape[3]) <= LARGEST:
            return _in_triton(q, k, v, pattern, call), None
        mapped = features(q, k, pattern.feature, call.parameters, call.key_mask)
        if pattern.causal:
            return causal_attention(*mapped, v, pattern, call.layout), None
        return linear_attention(*mapped, v), None

    def on_slabs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: Linear,
        slabs: Slabs,
        rank: int,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of a rank's tokens of a sequence that is cut in slabs, see `linear_on_slabs`."""
        from visattn.kernels.linear.slabs import linear_on_slabs

        return linear_on_slabs(q, k, v, pattern, slabs, rank, **options)


def _of_features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Linear attention of features [B, S, H, F] in Triton."""
    # Only here, so that listing backends does not import triton.
    from visattn.kernels.triton.linear.attention import linear_attention

    return linear_attention(q, k, v, None, "given")


def _in_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Linear, call: Call) -> torch.Tensor:
    """The same in Triton, which applies the feature maps without parameters itself."""
    # Only here, so that listing backends does not import triton.
    from visattn.kernels.triton.linear import attention as linear
    from visattn.kernels.triton.linear.causal import attention as causal

    feature, key_mask = pattern.feature, call.key_mask
    if feature not in linear.FEATURES:
        q, k = features(q, k, feature, call.parameters, key_mask)
        v, feature, key_mask = repeated(v, k.shape[2]), "given", None
    axis = pattern.causal_axis(call.layout.grid)
    if axis is None:
        return linear.linear_attention(q, k, v, key_mask, feature)
    rates = decay_rates(pattern, q.shape[2], q.new_empty(0, dtype=torch.float32)) if pattern.decay else None
    return causal.causal_linear_attention(q, k, v, call.layout, axis, rates, key_mask, feature)


backend = LinearBackend()
