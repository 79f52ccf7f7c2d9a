"""Attention along tile lists on plain tensors: what the kernel of the hub exports.

This file ships with the kernel: the standard library, torch and triton only, Python 3.9, and of the package nothing but
the kernels beside which it is laid out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from visattn.kernels.triton.lists.delta import deltas
from visattn.kernels.triton.lists.forward import attend
from visattn.kernels.triton.lists.key_grad import key_gradients
from visattn.kernels.triton.lists.query_grad import query_gradients

LOG2E = 1.4426950408889634
BLOCK_DIMS = (16, 32, 64, 128, 256)


class Lists(NamedTuple):
    """The lists of one kernel, from the side of its row tiles: queries, or keys for the gradients of k and v.

    Attributes:
        tokens: Token of each slot of a row tile, -1 if empty: int32 [row tiles, rows]; dense rows first.
        bounds: Where the list of a row tile starts, turns partial and stops, and how many steps of dense columns it
            visits: int32 [row tiles, 4].
        bases: First token of each listed column tile: int32 [entries].
        mask_ids: Mask of each listed column tile, 0 where it needs none: int32 [entries].
        offsets: Token of each slot of a column tile, minus the token of slot 0: int32 [columns / tiles].
        masks: Visible columns of each row slot, a bit each: int32 [masks, rows, words].
        rows: Slots of a row tile, a power of two of at least 16.
        columns: Slots of the column tiles of one step, a power of two.
        tiles: Column tiles of one step.
        dense_rows: Row tiles of tokens before and after the grid.
        prefix_tiles: Steps over the tokens before the grid.
        suffix_tiles: Steps over the tokens after it.
        prefix: Tokens before the grid.
        suffix_start: First token after the grid.
        suffix: Tokens after it.
        full: Whether any list entry needs no mask.
        partial: Whether any list entry needs one.
        reach: Tokens between the first and the last slot of a column tile.
        warps: Warps of a program.
        stages: Stages of its loops.
    """

    tokens: torch.Tensor
    bounds: torch.Tensor
    bases: torch.Tensor
    mask_ids: torch.Tensor
    offsets: torch.Tensor
    masks: torch.Tensor
    rows: int
    columns: int
    tiles: int
    dense_rows: int
    prefix_tiles: int
    suffix_tiles: int
    prefix: int
    suffix_start: int
    suffix: int
    full: bool
    partial: bool
    reach: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The lists of a pattern on a grid, for tensors of one dtype and head dim on one device.

    Attributes:
        forward: Of the forward, by queries.
        key_grad: Of the gradients of k and v, by keys.
        query_grad: Of the gradient of q, by queries.
    """

    forward: Lists
    key_grad: Lists
    query_grad: Lists


def tile_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query tile to its list of key tiles, with gradients of q, k and v.

    Args:
        q: Queries [B, S, H, D], float16, bfloat16 or float32; D is a multiple of 8 up to 256, contiguous.
        k: Keys [B, S, Hkv, D], Hkv divides H.
        v: Values [B, S, Hkv, D].
        plan: The lists.
        scale: Factor on the logits, not negative; D ** -0.5 if None.

    Returns:
        Output [B, S, H, D] in q's dtype and log-sum-exp [B, H, S] in float32; only the first has gradients.

    Raises:
        ValueError: If the tensors do not fit together.
    """
    _check(q, k, v)
    return _TileAttention.apply(q, k, v, plan, q.shape[3] ** -0.5 if scale is None else float(scale))


def tile_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from that of the output; arguments as of `tile_attention`, and its results."""
    grad_out = _last_contiguous(grad_out)
    delta = torch.empty_like(lse)
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    step = _unit(grad_out)
    batch, length, heads, head_dim = out.shape
    given: dict[str, Any]
    with _on(q.device):
        given = {"out": out, "grad_out": grad_out, "grad_lse": out, "delta": delta, "length": length, "heads": heads}
        given.update(grad_lse_batch=0, grad_lse_token=0, grad_lse_head=0, **_strides("grad", grad_out, step))
        given.update(HEAD_DIM=head_dim, BLOCK_DIM=_block_dim(head_dim), ROWS=32, UNIT=step, LSE=False, num_warps=4)
        deltas[(-(-length // 32) * heads * batch,)](**given)
        for kernel, run, results, columns in (
            (key_gradients, plan.key_grad, {"grad_k": grad_k, "grad_v": grad_v}, (q, grad_out)),
            (query_gradients, plan.query_grad, {"grad_q": grad_q}, (k, v)),
        ):
            pairs = batch * (k.shape[2] if kernel is key_gradients else heads)
            given = _given(run, q, k, v, columns, pairs, (grad_out,))
            given.update(grad_out=grad_out, lse=lse, delta=delta, scale=scale, score_scale=scale * LOG2E, **results)
            given.update(_strides("grad", grad_out, given["UNIT"]))
            _start(kernel, run, given)
    return grad_q, grad_k, grad_v


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> Any:
        q, k, v = (_last_contiguous(t) for t in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
        run = plan.forward
        given = _given(run, q, k, v, (k, v), q.shape[0] * q.shape[2], ())
        given.update(out=out, lse=lse, scale=scale * LOG2E, LSE=True)
        with _on(q.device):
            _start(attend, run, given)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return (*tile_attention_backward(grad_out, q, k, v, out, lse, ctx.plan, ctx.scale), None, None)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % max(k.shape[2], 1) or q.shape[3] % 8 or q.shape[3] > BLOCK_DIMS[-1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must be [B, S, heads, D] with D a multiple "
            "of 8 up to 256, k and v alike, and their heads a divisor of q's"
        )


def _given(
    run: Lists, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, columns: Any, pairs: int, more: Any
) -> dict[str, Any]:
    """The arguments that the kernels have in common."""
    step = _unit(q, k, v, *more)
    reach = max(run.columns, run.reach) * max(abs(t.stride(1)) for t in columns) + q.shape[3]
    return {
        **{"q": q, "k": k, "v": v, "key_mask": q, "rpb": q},
        **_strides("q", q, step),
        **_strides("k", k, step),
        **_strides("v", v, step),
        **{"heads": q.shape[2], "group": q.shape[2] // k.shape[2], "length": q.shape[1], "key_length": k.shape[1]},
        **{name: getattr(run, name) for name in ("tokens", "bounds", "bases", "mask_ids", "offsets", "masks")},
        **{"bounds_batch": 0, "list_batch": 0, "list_heads": q.shape[2], "extra": 0},
        **{name: getattr(run, name) for name in ("dense_rows", "prefix_tiles", "suffix_tiles", "prefix")},
        **{"suffix_start": run.suffix_start, "suffix": run.suffix},
        **{"grid_rows": len(run.tokens) - run.dense_rows, "pairs": pairs},
        **{"positions": run.tokens, "position_offsets": run.tokens, "centre": 0, "rpb_entries": 0},
        **{"HEAD_DIM": q.shape[3], "BLOCK_DIM": _block_dim(q.shape[3]), "UNIT": step},
        **{"KEY_MASK": False, "RPB": False, "PRECISION": "ieee" if q.dtype != torch.float32 else "tf32x3"},
        **{"ROWS": run.rows, "COLUMNS": run.columns, "TILES": run.tiles},
        **{"FULL": run.full, "PARTIAL": run.partial, "DENSE": run.prefix_tiles + run.suffix_tiles > 0},
        **{"WIDE": reach >= 2**31, "ALIKE": columns[0].stride(1) == columns[1].stride(1)},
    }


def _start(kernel: Any, run: Lists, given: dict[str, Any]) -> None:
    grid = ((given["dense_rows"] + given["grid_rows"]) * given["pairs"],)
    kernel[grid](**given, num_warps=run.warps, num_stages=run.stages, enable_fp_fusion=True)


def _block_dim(head_dim: int) -> int:
    return next(d for d in BLOCK_DIMS if d >= head_dim)


def _unit(*tensors: torch.Tensor) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride but the last, so that the kernels know alignments."""
    strides = [s for t in tensors for s, n in zip(t.stride()[:-1], t.shape[:-1]) if n > 1]  # noqa: B905  Python 3.9
    return next(u for u in (8, 4, 2, 1) if all(s % u == 0 for s in strides))


def _strides(name: str, x: torch.Tensor, unit: int) -> dict[str, int]:
    axes = zip(("batch", "token", "head"), x.stride()[:3], x.shape[:3])  # noqa: B905  Python 3.9
    return {f"{name}_{axis}": 0 if n == 1 else stride // unit for axis, stride, n in axes}


def _last_contiguous(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else _Here()


class _Here:
    def __enter__(self) -> None:
        """Nothing to do where Triton interprets kernels."""

    def __exit__(self, *error: Any) -> None:
        """Nothing to undo."""
