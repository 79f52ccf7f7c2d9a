"""What the causal kernels are given: chunks, launches and arguments, for launches and for ahead-of-time compilation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from visattn.kernels.triton.arguments import strides, unit
from visattn.kernels.triton.linear.attention import Launch, Setting, Weights, launches, power, splitting, weights_or

# Tokens of a chunk at least, and the features above which it has as many: then a state is no more than its tokens.
CHUNK = 64
# Numbers of a block of `run_states`.
BLOCK = 512


class Steps(NamedTuple):
    """How the tokens of a grid lie along its causal axis, and how weights fade.

    Attributes:
        positions: Of the axis.
        each: Tokens of a position.
        inner: Tokens of a position that lie in a row.
        size: Positions of a chunk.
        decay: Whether weights fade.
    """

    positions: int
    each: int
    inner: int
    size: int
    decay: bool

    @classmethod
    def of(cls, grid: tuple[int, ...], axis: int, features: int, decay: bool) -> Steps:
        """Of a grid, in chunks for so many features."""
        inner = math.prod(grid[axis + 1 :])
        each = inner * math.prod(grid[:axis])
        return cls(grid[axis], each, inner, min(grid[axis], -(-max(CHUNK, features) // each)), decay)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.positions // self.size)

    @property
    def products(self) -> bool:
        """Whether tokens of a chunk see others of it one by one: a chunk of one position is all in its state."""
        return self.size > 1

    def arguments(self) -> dict[str, Any]:
        """What the kernels take of it."""
        named = {"positions": self.positions, "each": self.each, "inner": self.inner, "size": self.size}
        return {**named, "chunks": self.chunks, "DECAY": self.decay}


def causal_launches(dtype: torch.dtype, features: int, channels: int) -> dict[str, Launch]:
    """The launch of each kernel by its name, for inputs of these sizes."""
    f, d = power(features), power(channels)
    gathers = launches(dtype, features, channels)
    table = {"gather_chunks": gathers["gather"], "gather_chunks_grad": gathers["gather_grad"]}
    if dtype == torch.float32:
        return table | {
            "read_chunks": Launch(16, d, 32, 4 if d <= 128 else 8, 1),
            "chunk_grad": Launch(min(f, 32), min(d, 32), 16, 4, 1),
        }
    # Found by compiling for every architecture: none of these spills (`visattn.kernels.triton.resources`).
    read = 32 if d <= 64 and dtype == torch.bfloat16 else 16
    wide = Launch(128 if f == 128 else 64, min(d, 16), 64, 8, 2)
    return table | {
        "read_chunks": Launch(min(f, read), d, 64 if d <= 128 else 32, 4 if d <= 32 else 8, 2),
        "chunk_grad": Launch(f, min(d, 32), 64, 8 if f == 32 else 4, 2) if f <= 64 else wide,
    }


def chunk_arguments(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    weights: Weights | None,
    heads: int,
    rates: torch.Tensor,
    steps: Steps,
    setting: Setting,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `gather_chunks`, and its result; with weights it gathers queries, in reverse."""
    batch, length, own, features = k.shape
    channels, step = v.shape[3], unit(k, v)
    feature_blocks = -(-features // launch.features)
    blocks = feature_blocks * -(-channels // launch.channels)
    tokens = steps.size * steps.each
    part, splits = splitting(tokens, batch * heads * steps.chunks * blocks, launch.rows, k.device)
    shape = (batch, heads, steps.chunks, splits, features * channels + features)
    return {
        "k": k, "v": v, "key_mask": rates if key_mask is None else key_mask, **weights_or(rates, weights),
        "rates": rates, "states": k.new_empty(shape, dtype=torch.float32),
        **strides("k", k, step), **strides("v", v, step),
        "heads": heads, "group": heads // own, "length": length, **steps.arguments(),
        "part": part, "splits": splits, "blocks": blocks, "feature_blocks": feature_blocks,
        **_sizes(features, channels, step, launch, setting, v.dtype),
        "KEY_MASK": key_mask is not None, "REVERSE": weights is not None, "HALF": k.dtype == v.dtype == torch.bfloat16,
    }  # fmt: skip


def _sizes(
    features: int, channels: int, step: int, launch: Launch, setting: Setting, values: torch.dtype
) -> dict[str, Any]:
    """Compile-time sizes and options that the kernels over tokens share."""
    return {
        "FEATURES": features, "CHANNELS": channels, "UNIT": step,
        "BLOCK_F": launch.features, "BLOCK_D": launch.channels, "ROWS": launch.rows,
        "FEATURE": setting.feature, "PRECISION": setting.precision(values),
    }  # fmt: skip


def state_arguments(
    states: torch.Tensor, dense: torch.Tensor | None, rates: torch.Tensor, steps: Steps, reverse: bool
) -> dict[str, Any]:
    """Arguments of `run_states`, which changes the states [B, H, chunks, width]."""
    width = states.shape[3]
    return {
        "states": states, "dense": rates if dense is None else dense, "rates": rates,
        "heads": states.shape[1], "size": steps.size, "chunks": steps.chunks,
        "width": width, "blocks": -(-width // BLOCK),
        "BLOCK": BLOCK, "DECAY": steps.decay, "REVERSE": reverse, "INCLUSIVE": not steps.products,
        "DENSE": dense is not None,
    }  # fmt: skip


def read_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    states: torch.Tensor,
    dense: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weights: Weights | None,
    rates: torch.Tensor,
    steps: Steps,
    setting: Setting,
    launch: Launch,
    values: torch.dtype,
) -> dict[str, Any]:
    """Arguments of `read_chunks`, and its results; with weights rows are keys and `v` the output's gradient."""
    heads, features, channels, step = len(rates), q.shape[3], v.shape[3], unit(q, k, v)
    per_token = (q.shape[0], heads, q.shape[1])
    den, peak = weights[::2] if weights else (q.new_empty(per_token, dtype=torch.float32) for _ in range(2))
    return {
        "q": q, "k": k, "v": v, "states": states, "dense": rates if dense is None else dense,
        "key_mask": rates if key_mask is None else key_mask, "den": den, "peak": peak, "rates": rates,
        "out": q.new_empty((*q.shape[:2], heads, channels), dtype=values),
        **strides("q", q, step), **strides("k", k, step), **strides("v", v, step),
        "heads": heads, "q_group": heads // q.shape[2], "group": heads // k.shape[2], "length": q.shape[1],
        **steps.arguments(), "tiles": -(-steps.size * steps.each // launch.rows),
        **_sizes(features, channels, step, launch, setting, v.dtype),
        "KEY_MASK": key_mask is not None, "REVERSE": weights is not None, "PRODUCTS": steps.products,
        "DENSE": dense is not None, "HALF": q.dtype == v.dtype == torch.bfloat16,
    }  # fmt: skip


def grad_arguments(
    x: torch.Tensor,
    rows: torch.Tensor,
    others: torch.Tensor,
    values: torch.Tensor,
    states: torch.Tensor,
    dense: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weights: Weights,
    rates: torch.Tensor,
    reverse: bool,
    steps: Steps,
    setting: Setting,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `chunk_gradients`, and its result; in reverse x are keys."""
    heads, features, channels, step = len(rates), x.shape[3], rows.shape[3], unit(x, rows, others, values)
    return {
        "x": x, "rows": rows, "others": others, "values": values, "states": states,
        "dense": rates if dense is None else dense, "key_mask": rates if key_mask is None else key_mask,
        **weights._asdict(), "rates": rates, "grad_x": x.new_empty((*x.shape[:2], heads, features)),
        **strides("x", x, step), **strides("rows", rows, step),
        **strides("others", others, step), **strides("values", values, step),
        "heads": heads, "x_group": heads // x.shape[2], "group": heads // others.shape[2], "length": x.shape[1],
        **steps.arguments(), "tiles": -(-steps.size * steps.each // launch.rows),
        **_sizes(features, channels, step, launch, setting, rows.dtype),
        "KEY_MASK": key_mask is not None, "REVERSE": reverse, "PRODUCTS": steps.products, "DENSE": dense is not None,
    }  # fmt: skip
