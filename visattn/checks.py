"""Whether the arguments of `attention` fit together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from visattn.layout import Layout
from visattn.patterns import BiasedPattern, Pattern
from visattn.patterns.kinds import pooled_part


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    layout: Layout,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Raise a ValueError that names the first argument of `attention` that does not fit the others."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes} must all be [batch, tokens, heads, head_dim]")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes} must agree in batch, tokens and head_dim, and k and v also in heads")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k and v")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must be one floating-point dtype: cast them first")
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device} and v on {v.device} must be on one device")
    layout.check_length(q.shape[1])
    pattern.check(layout.grid)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != q.shape[:2]):
        given = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(
            f"key_mask is {given} but must be torch.bool {list(q.shape[:2])}: True where a key may be attended"
        )
    for name, tensor in (("key_mask", key_mask), ("rpb", rpb), *parameters.items()):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q on {q.device}: move it there")
    if rpb is not None:
        if not isinstance(pattern, BiasedPattern):
            raise ValueError(f"rpb is given but {pattern} has no relative position bias: only na(...) has")
        sides = pattern.rpb_shape(layout.grid)
        if tuple(rpb.shape) != (q.shape[2], *sides):
            raise ValueError(
                f"rpb is {list(rpb.shape)} but {pattern} with {q.shape[2]} heads takes {[q.shape[2], *sides]}"
            )
    check_parameters(parameters, pattern, q.shape[2], q.shape[3], layout.grid)


def check_parameters(
    parameters: Mapping[str, torch.Tensor], pattern: Pattern, heads: int, head_dim: int, grid: tuple[int, ...]
) -> None:
    """Raise a ValueError that names a parameter which the pattern does not have, or not in this shape."""
    # Cells over a whole axis have a weight per token too, but none that other grids could use.
    pooled = pooled_part(pattern)
    cell = None if pooled is None else pooled.pool_shape(grid)
    known = ({} if cell is None else {"pool_weight": cell}) | pattern.parameter_shapes(heads, head_dim, grid)
    for name, tensor in parameters.items():
        if name == "pool_weight" and name not in known:
            raise ValueError(f"pool_weight is given but {pattern} pools no keys: only clear(radius=..., pool=...) does")
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{pattern} has no parameter {name!r}; parameters: {names}")
        if tuple(tensor.shape) != known[name]:
            raise ValueError(f"{name} is {list(tensor.shape)} but {pattern} takes {list(known[name])}")


def merged(
    parameters: Mapping[str, torch.Tensor] | None, pool_weight: torch.Tensor | None
) -> Mapping[str, torch.Tensor]:
    """The parameters with `pool_weight`, which also has an argument of its own.

    Raises:
        ValueError: If it is given twice.
    """
    if pool_weight is None:
        return parameters or {}
    if parameters and "pool_weight" in parameters:
        raise ValueError("pool_weight is given twice: as an argument and in parameters")
    return {**(parameters or {}), "pool_weight": pool_weight}
