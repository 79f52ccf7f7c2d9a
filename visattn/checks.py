"""Whether the arguments of `attention` fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from visattn.given import as_numbers, mapping, said
from visattn.layout import Layout, check_layout
from visattn.patterns import BiasedPattern, Pattern
from visattn.patterns.choice.memory import here
from visattn.patterns.kinds import pooled_part, reads_products
from visattn.patterns.masks import check_defined
from visattn.patterns.traced import constant
from visattn.patterns.values import LARGEST, LARGEST_REAL
from visattn.problem import PRECISIONS

# What backends compute in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    check_tensors(q, k, v, layout)
    check_fit(q, k, v, pattern, layout, key_mask, rpb, parameters)


def check_fit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    layout: Layout,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
) -> None:
    """The same for what `check_tensors` leaves: dtypes and devices, layout and pattern, and the other tensors."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"q {q.dtype}, k {k.dtype} and v {v.dtype} must be one floating-point dtype of {names}: cast them first"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device} and v on {v.device} must be on one device")
    layout.check_length(q.shape[1])
    if layout.key_layout is not None:
        layout.key_layout.check_length(k.shape[1], "k")
    _check_defined(pattern, layout)
    if key_mask is not None or rpb is not None or parameters:
        _check_others(q, k, pattern, layout, key_mask, rpb, parameters)


def check_precision(precision: Any, tensors: Iterable[Any]) -> None:
    """Raise a ValueError for a precision that there is not, or whose gradients some of the tensors ask for."""
    if precision is None:
        return
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision={said(precision)} must be None or one of {', '.join(map(repr, PRECISIONS))}")
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors):
        raise ValueError(
            f"precision={precision!r} is for inference: rounding to 8 bits has no gradient. Call it under "
            "torch.no_grad(), or leave precision out where gradients (of q, k, v or parameters) are needed"
        )


def check_asked(kv_heads: Any, value_dim: Any, flags: Mapping[str, Any]) -> None:
    """Raise a ValueError for what `explain` is told of tensors that it does not get."""
    for name, value in (("kv_heads", kv_heads), ("value_dim", value_dim)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={said(value)} must be a whole number of at least 1, or None for that of q")
        if value is not None and value > LARGEST:
            raise ValueError(f"{name}={value} must be at most {LARGEST}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is a {type(value).__name__} but must be True or False: whether it will be passed")


def check_steps(pattern: Pattern) -> None:
    """Raise a ValueError for a pattern that keeps something from step to step where nothing tells the step."""
    if pattern.needs_steps and here() is None:
        raise ValueError(
            f"{pattern} keeps something from one denoising step to the next, and a call of attention() knows no "
            f"steps: apply() it to a pipeline, or {pattern.stepless}"
        )


# Most calls name a pattern and a layout that have passed.
@lru_cache(maxsize=1024)
def _check_defined(pattern: Pattern, layout: Layout) -> None:
    check_defined(pattern, layout)


def _check_others(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: Pattern,
    layout: Layout,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
) -> None:
    """The tensors beside q, k and v."""
    optional = {"key_mask": key_mask, "rpb": rpb}
    others = [*((name, tensor) for name, tensor in optional.items() if tensor is not None), *parameters.items()]
    for name, tensor in others:
        if not isinstance(tensor, torch.Tensor):
            given = f"{name} is a {type(tensor).__name__}"
            raise ValueError(f"{'parameters: ' * (name in parameters)}{given}: pass a torch tensor, or leave it out")
        _check_strided(name, tensor)
        if name != "key_mask" and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} but must be floating-point: cast it")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        given = f"{key_mask.dtype} {list(key_mask.shape)}"
        raise ValueError(
            f"key_mask is {given} but must be torch.bool {list(k.shape[:2])}: True where a key may be attended"
        )
    for name, tensor in others:
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q on {q.device}: move it there")
    if rpb is not None:
        sides = check_biased(pattern, layout).rpb_shape(layout.grid)
        if tuple(rpb.shape) != (q.shape[2], *sides):
            raise ValueError(
                f"rpb is {list(rpb.shape)} but {pattern} with {q.shape[2]} heads takes {[q.shape[2], *sides]}"
            )
    check_parameters(parameters, pattern, q.shape[2], q.shape[3], layout.keys.grid)


def check_biased(pattern: Pattern, layout: Layout) -> BiasedPattern:
    """The pattern, if it may have a relative position bias on a layout.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(pattern, BiasedPattern):
        raise ValueError(f"rpb is given but {pattern} has no relative position bias: only na(...) has")
    if layout.key_layout is not None or pattern.wraps(layout.grid):
        why = "keys have a layout of their own" if layout.key_layout is not None else "an axis is circular"
        raise ValueError(f"rpb is given but {why}, and its entries count steps on one grid with ends: leave it out")
    return pattern


def check_values(pattern: Pattern | str, keys: int, values: int) -> None:
    """Raise a ValueError if a pattern does not take values of other channels than the keys'."""
    if keys != values and not constant(reads_products, pattern):
        raise ValueError(
            f"v has {values} channels and k {keys}, and {pattern} takes as many of both, as its weights are more than "
            f"products of q and k: cut v in parts of {keys} channels, one call each"
        )


def check_tensors(q: Any, k: Any, v: Any, layout: Layout) -> None:
    """Raise a ValueError if q, k and v are no tensors of attention, or the layout is none."""
    check_layout(layout)
    for name, given in (("q", q), ("k", k), ("v", v)):
        if not isinstance(given, torch.Tensor):
            kind = f"{type(given).__module__}.{type(given).__qualname__}"
            raise ValueError(f"{name} is a {kind}: pass torch tensors [batch, tokens, heads, head_dim]")
        _check_strided(name, given)
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{_shapes(q, k, v)} must all be [batch, tokens, heads, head_dim]")
    lengths = layout.length, layout.keys.length, layout.keys.length
    if all(t.shape[2] == n for t, n in zip((q, k, v), lengths, strict=True)) and q.shape[1] != layout.length:
        raise ValueError(
            f"{_shapes(q, k, v)} are in torch's order [batch, heads, tokens, head_dim]: pass q.transpose(1, 2), "
            "k.transpose(1, 2) and v.transpose(1, 2), and transpose the output back"
        )
    own = layout.key_layout is not None
    if (
        k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or (q.shape[1] != k.shape[1] and not own)
        or q.shape[3] != k.shape[3]
    ):
        hint = ""
        if q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]:
            hint = f": cut v in parts of {k.shape[3]} channels, one call each"
        elif q.shape[0] == k.shape[0] and k.shape == v.shape and q.shape[3] == k.shape[3]:
            hint = (
                ": patterns are for self-attention, in which queries and keys are the same tokens, unless "
                "key_layout=Layout(...) says where the keys are"
            )
        shapes = _shapes(q, k, v)
        raise ValueError(f"{shapes} must agree in batch, tokens and head_dim, and k and v also in heads{hint}")
    if not q.shape[2] or not k.shape[2] or not q.shape[3]:
        raise ValueError(f"{_shapes(q, k, v)} must have at least one head and one channel per head")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k and v: "
            "give each key head as many query heads"
        )


def _check_strided(name: str, given: torch.Tensor) -> None:
    if given.layout is not torch.strided:
        raise ValueError(f"{name} is a tensor of layout {given.layout}: pass it as {name}.to_dense()")
    if hasattr(given, "device_mesh"):
        # Plans and tables are of one process, and DTensors do not mix with them.
        raise ValueError(
            f"{name} is a DTensor: pass {name}.to_local(), as each process runs its own samples or heads, or "
            f"{name}.full_tensor(); tokens are shared by visattn.parallel"
        )


def other_values(q: Any, k: Any, v: Any) -> bool:
    """Whether values have other channels than keys, and tensors are of attention but for that."""
    if not all(isinstance(t, torch.Tensor) and t.ndim == 4 for t in (q, k, v)):
        return False
    return k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3] != v.shape[3] and v.shape[3] > 0


def _shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def factor(scale: Any, head_dim: int) -> float:
    """The factor on the logits that `scale` stands for.

    Raises:
        ValueError: If it is no finite number.
        TypeError: If it is a tensor whose gradient would be lost.
    """
    if scale is None:
        return max(1, head_dim) ** -0.5
    if isinstance(scale, torch.Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            "scale is a tensor that requires a gradient, and a factor of the kernels gets none: multiply q by it and "
            "pass scale=1.0, or pass float(scale)"
        )
    try:
        # float makes numbers of text, and of truths.
        number = math.nan if isinstance(scale, str | bytes | bytearray | bool) else float(scale)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_REAL:
        raise ValueError(f"scale={said(scale)} must be one finite float32 number, or None for head_dim ** -0.5")
    return number


def check_parameters(
    parameters: Mapping[str, torch.Tensor], pattern: Pattern, heads: int, head_dim: int, grid: tuple[int, ...]
) -> None:
    """Raise a ValueError that names a parameter which the pattern does not have, or not in this shape.

    The grid is that of the keys, whose cells are pooled.
    """
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
    if parameters is not None:
        mapping(parameters, "parameters", "from their names to tensors")
    if pool_weight is None:
        return parameters or {}
    if parameters and "pool_weight" in parameters:
        raise ValueError("pool_weight is given twice: as an argument and in parameters")
    return {**(parameters or {}), "pool_weight": pool_weight}


def row_tensor(rows: Any, name: str = "rows") -> torch.Tensor:
    """Rows as a tensor of whole numbers; an empty list is one of no rows."""
    try:
        found = as_numbers(rows)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={said(rows)} must be whole numbers, the tokens whose queries are asked for") from None
    if found.dtype == torch.bool or found.is_complex() or (found.is_floating_point() and found.numel()):
        raise ValueError(
            f"{name} are {found.dtype} but must be whole numbers, the tokens whose queries are asked for: pass "
            "mask.nonzero()[:, 0] for a mask"
        )
    return found.long()
