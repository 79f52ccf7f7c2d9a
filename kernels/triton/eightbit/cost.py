"""What quantising costs the device, for the rule that picks a backend."""

from __future__ import annotations

from visattn.dispatch import Problem

# Microseconds at least, and for a million numbers of q and of k, on an H200 (docs/results/gpu-eightbit.json).
LEAST_US, Q_US, K_US = 20, 0.74, 2.3


def quantise_us(problem: Problem) -> float:
    """What quantising the tensors of a call takes the device, in microseconds."""
    heads = problem.batch * problem.head_dim * 1e-6
    rows, columns = problem.layout.length, problem.layout.keys.length
    return LEAST_US + heads * (Q_US * problem.heads * rows + K_US * problem.kv_heads * columns)
