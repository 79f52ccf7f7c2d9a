"""Linear attention in Triton: (k^T v) states in float32, forward and backward, without atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from visattn.kernels.linear.plain import plain_attention
from visattn.kernels.second_order import by_autograd
from visattn.kernels.triton import start
from visattn.kernels.triton.arguments import delta_arguments, delta_programs, strides, unit
from visattn.kernels.triton.linear.gather import gather
from visattn.kernels.triton.linear.grad import feature_gradients
from visattn.kernels.triton.linear.read import read
from visattn.kernels.triton.lists.delta import deltas
from visattn.kernels.triton.splits import splits_of
from visattn.kernels.unchanged import savable
from visattn.operands import in_rows

FEATURES = ("elu", "relu", "given")
# Largest number of features and channels.
LARGEST = 256
# Programs that run at once on a multiprocessor in `gather`: splits are to fill the GPU once.
RESIDENT = 2


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        features: Features of a block.
        channels: Channels of a block.
        rows: Tokens of a block.
        warps: Warps per program.
        stages: Steps in flight.
    """

    features: int
    channels: int
    rows: int
    warps: int
    stages: int


def power(n: int, least: int = 16) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


def launches(dtype: torch.dtype, features: int, channels: int) -> dict[str, Launch]:
    """The launch of each kernel by its name, for inputs of these sizes."""
    f, d = power(features), power(channels)
    if dtype == torch.float32:
        return {
            "gather": Launch(min(f, 64), min(d, 64), 32, 4, 2),
            "gather_grad": Launch(min(f, 64), min(d, 64), 64 if f <= 16 else 32, 4, 1),
            "read": Launch(16, d, 32, 4 if d <= 128 else 8, 1),
            "feature_grad": Launch(min(f, 64), min(d, 32), 32, 4, 1),
        }
    return {
        "gather": Launch(min(f, 128), min(d, 128), 64, 8, 2),
        "gather_grad": Launch(min(f, 64), min(d, 128), 32, 4, 2),
        "read": Launch(min(f, 64 if d <= 64 else 32), d, 64, 4 if d <= 128 else 8, 2),
        "feature_grad": Launch(min(f, 128), min(d, 64 if f <= 64 else 32), 64, 4, 2),
    }


class Setting(NamedTuple):
    """What a call asks for besides its tensors.

    Attributes:
        feature: One of `FEATURES`.
        tf32: Whether float32 products may round their factors to tf32.
    """

    feature: str
    tf32: bool

    def precision(self, dtype: torch.dtype) -> str:
        """Of float32 products: the ten bits of tf32 are enough beside half precision inputs."""
        return "tf32" if self.tf32 or dtype != torch.float32 else "tf32x3"


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    feature: str = "elu",
) -> torch.Tensor:
    """out_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) sum_j phi(k_j)), in time linear in the tokens.

    Source: Katharopoulos et al., "Transformers are RNNs" (ICML 2020), equations 5 and 7.

    Args:
        q: Queries [B, S, H, F], any strides; F is D unless features are given.
        k: Keys [B, N, Hkv, F] in q's dtype, H a multiple of Hkv.
        v: Values [B, N, Hkv, D]; next to given features they may be of another dtype.
        key_mask: bool [B, N], True where a key counts; None means all.
        feature: phi: "elu" (elu + 1), "relu", or "given" where q and k are features already, not negative.

    Returns:
        [B, S, H, D] in v's dtype. A query with denominator 0 gives zeros.

    Raises:
        ValueError: If the feature is unknown, or there are more than 256 features or channels.
    """
    dtype = v.dtype
    q, k, v = readable(q, k, v, feature)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    setting = Setting(feature, bool(torch.backends.cuda.matmul.allow_tf32))
    return LinearAttention.apply(q, k, v, mask, setting).to(dtype)


def readable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as kernels read them: channels in a row.

    Raises:
        ValueError: If the feature is unknown, or there are more than 256 features or channels.
    """
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r} must be one of {', '.join(FEATURES)}")
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        raise ValueError(f"{q.shape[-1]} features and {v.shape[-1]} channels: both must be at most {LARGEST}")
    q, k, v = (in_rows(t) for t in (q, k, v))
    if q.device.type == "cpu":
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
        q, k, v = (t.float() if t.dtype == torch.bfloat16 else t for t in (q, k, v))
    return q, k, v


class Weights(NamedTuple):
    """What a query's gradient is weighted by, float32 [B, H, S] each: denominators, rowsum(out * grad), peaks."""

    den: torch.Tensor
    delta: torch.Tensor
    peak: torch.Tensor


def weights_or(other: torch.Tensor, weights: Weights | None) -> dict[str, torch.Tensor]:
    """The weights as arguments, `other` in place of all where there are none."""
    return dict.fromkeys(Weights._fields, other) if weights is None else weights._asdict()


def common(
    x: torch.Tensor, values: torch.dtype, setting: Setting, launch: Launch, sizes: tuple[int, int, int]
) -> dict[str, Any]:
    """Arguments that every kernel takes; x is [B, S, heads, ...], sizes are features, channels and the unit."""
    return {
        "heads": x.shape[2], "length": x.shape[1],
        "FEATURES": sizes[0], "CHANNELS": sizes[1], "UNIT": sizes[2],
        "BLOCK_F": launch.features, "BLOCK_D": launch.channels, "ROWS": launch.rows,
        "FEATURE": setting.feature, "PRECISION": setting.precision(values),
    }  # fmt: skip


def gather_arguments(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    weights: Weights | None,
    setting: Setting,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `gather`, and its results."""
    batch, length, heads, features = k.shape
    channels, step = v.shape[3], unit(k, v)
    feature_blocks = -(-features // launch.features)
    blocks = feature_blocks * -(-channels // launch.channels)
    chunk, splits = splitting(length, batch * heads * blocks, launch.rows, k.device)
    return {
        "k": k, "v": v, "key_mask": k if key_mask is None else key_mask,
        **weights_or(k, weights),
        "states": k.new_empty((batch, heads, splits, features, channels), dtype=torch.float32),
        "sums": k.new_empty((batch, heads, splits, features), dtype=torch.float32),
        **strides("k", k, step), **strides("v", v, step),
        "chunk": chunk, "splits": splits, "blocks": blocks, "feature_blocks": feature_blocks,
        **common(k, v.dtype, setting, launch, (features, channels, step)),
        "KEY_MASK": key_mask is not None, "WEIGHTED": weights is not None, "HALF": k.dtype == v.dtype == torch.bfloat16,
    }  # fmt: skip


def splitting(length: int, programs: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a split and their number, see `splits_of`."""
    return splits_of(length, programs, rows, RESIDENT, device)


def summed(given: dict[str, Any], group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The splits' results added up, and those of heads that share keys: [B, H / group, F, D] and [B, H / group, F]."""

    def total(parts: torch.Tensor) -> torch.Tensor:
        if group == 1 and parts.shape[2] == 1:
            return parts.squeeze(2)
        return parts.unflatten(1, (-1, group)).sum((2, 3))

    return total(given["states"]), total(given["sums"])


def read_arguments(
    q: torch.Tensor,
    state: torch.Tensor,
    sums: torch.Tensor,
    key_mask: torch.Tensor | None,
    values: torch.dtype,
    normalise: bool,
    setting: Setting,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `read`, and its results."""
    features, channels, step = q.shape[3], state.shape[3], unit(q)
    per_token = (q.shape[0], q.shape[2], q.shape[1])
    den, peak = (q.new_empty(per_token, dtype=torch.float32) if normalise else q for _ in range(2))
    return {
        "q": q, "state": state, "sums": sums, "key_mask": q if key_mask is None else key_mask,
        "out": q.new_empty((*q.shape[:3], channels), dtype=values), "den": den, "peak": peak,
        **strides("q", q, step), "group": q.shape[2] // state.shape[1],
        **common(q, values, setting, launch, (features, channels, step)),
        "KEY_MASK": key_mask is not None, "NORMALISE": normalise, "HALF": q.dtype == values == torch.bfloat16,
    }  # fmt: skip


def grad_arguments(
    x: torch.Tensor,
    rows: torch.Tensor,
    state: torch.Tensor,
    sums: torch.Tensor,
    key_mask: torch.Tensor | None,
    weights: Weights | None,
    setting: Setting,
    launch: Launch,
) -> dict[str, Any]:
    """Arguments of `feature_gradients`, and its result; x are queries if there are weights."""
    features, channels, step = x.shape[3], rows.shape[3], unit(x, rows)
    return {
        "x": x, "rows": rows, "state": state, "sums": sums, "key_mask": x if key_mask is None else key_mask,
        **weights_or(sums, weights),
        "grad_x": x.new_empty(x.shape),
        **strides("x", x, step), **strides("rows", rows, step), "group": x.shape[2] // state.shape[1],
        **common(x, rows.dtype, setting, launch, (features, channels, step)),
        "KEY_MASK": key_mask is not None, "QUERIES": weights is not None,
    }  # fmt: skip


def run(kernel: Any, given: dict[str, Any], launch: Launch) -> None:
    """Start a kernel with as many programs as it has blocks."""
    first = next(given[name] for name in ("k", "q", "x") if name in given)
    pairs = first.shape[0] * first.shape[2]
    if kernel is gather:
        programs = pairs * given["blocks"] * given["splits"]
    else:
        programs = pairs * -(-given["length"] // launch.rows)
        if kernel is feature_gradients:
            programs *= -(-given["FEATURES"] // launch.features)
    start.launch_like(kernel, (programs,), given, launch.warps, launch.stages)


class LinearAttention(torch.autograd.Function):
    """Linear attention with its own backward; all inputs have contiguous channels."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, setting: Setting
    ) -> torch.Tensor:
        """State and sums of all keys, then every query reads them."""
        if not q.numel() or not v.numel():
            ctx.save_for_backward(q, k, v, *(None,) * 6)
            ctx.setting = setting
            return v.new_zeros((*q.shape[:3], v.shape[3]))
        table = launches(q.dtype, q.shape[3], v.shape[3])
        with start.on(q.device):
            given = gather_arguments(k, v, key_mask, None, setting, table["gather"])
            run(gather, given, table["gather"])
            state, sums = summed(given, 1)
            given = read_arguments(q, state, sums, None, v.dtype, True, setting, table["read"])
            run(read, given, table["read"])
        out = given["out"]
        ctx.save_for_backward(q, k, v, savable(key_mask), out, given["den"], given["peak"], state, sums)
        ctx.setting = setting
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The state's gradient is gathered from the queries as the state was from the keys."""
        q, k, v, key_mask, out, den, peak, state, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            shown = None if key_mask is None else key_mask.bool()
            plain = by_autograd(lambda q, k, v: plain_attention(q, k, v, ctx.setting.feature, shown))
            return *plain((q, k, v), (grad_out,)), None, None
        if out is None:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None
        setting, table = ctx.setting, launches(q.dtype, q.shape[3], v.shape[3])
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        want_q, want_k, want_v = ctx.needs_input_grad[:3]
        grads: list[torch.Tensor | None] = [None, None, None]
        with start.on(q.device):
            weights = Weights(den, row_sums(out, grad_out), peak)
            if want_q:
                given = grad_arguments(q, grad_out, state, sums, None, weights, setting, table["feature_grad"])
                run(feature_gradients, given, table["feature_grad"])
                grads[0] = given["grad_x"]
            if want_k or want_v:
                given = gather_arguments(q, grad_out, None, weights, setting, table["gather_grad"])
                run(gather, given, table["gather_grad"])
                grad_state, grad_sums = summed(given, q.shape[2] // k.shape[2])
            if want_k:
                given = grad_arguments(k, v, grad_state, grad_sums, key_mask, None, setting, table["feature_grad"])
                run(feature_gradients, given, table["feature_grad"])
                grads[1] = given["grad_x"]
            if want_v:
                given = read_arguments(k, grad_state, grad_sums, key_mask, v.dtype, False, setting, table["read"])
                run(read, given, table["read"])
                grads[2] = given["out"]
        return *grads, None, None


def row_sums(out: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
    """rowsum(out * grad_out), float32 [B, H, S]."""
    delta = out.new_empty((out.shape[0], out.shape[2], out.shape[1]), dtype=torch.float32)
    given = delta_arguments(out, grad_out, None, delta)
    start.launch_like(deltas, delta_programs(out, given), given, 4, 1)
    return delta
