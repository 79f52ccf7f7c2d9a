"""Each kernel on a small problem against dense attention under the mask, before its results are believed.

FlashAttention-4 compiles a kernel for each kind of call, and a package that ignores a list or a mask gives plausible
numbers: FlexAttention with BACKEND="FLASH" returned dense attention so. A trial compiles nothing that the call would
not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from visattn.kernels.fa4 import package
from visattn.kernels.fa4.blocks import Blocks
from visattn.kernels.fa4.words import Packed
from visattn.layout import Layout
from visattn.patterns import Pattern, parse
from visattn.patterns.masks import dense_mask, routed_mask
from visattn.rerun import autograd_inside_operator

# Relative error from which a result is no matter of rounding; a list that is ignored gives 0.5 and more.
LIMIT = 0.03

# Output and log-sum-exp of q, k, v, pattern, layout and scale.
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Text in a short tile, short tiles of the grid, full blocks, partial ones and hidden ones.
SMALL = {
    "dense": ("dense", Layout(700)),
    "1 axis": ("na(window=300)", Layout(900, suffix=70)),
    "2 axes": ("na(window=15x15)", Layout((30, 44), suffix=70)),
    "3 axes": ("na(window=5x13x13)", Layout((6, 20, 18), suffix=70)),
    "bits": ("clear(radius=12)", Layout((30, 44), suffix=70)),
    # Blocks of queries are as large as the kernels' own.
    "chosen": ("topk(keep=2,block={},key_block=8x16)", Layout((32, 48), suffix=70)),
}
# The second pattern of calls in which heads differ; both sides have the same tiles.
OTHER = {
    "1 axis": "na(window=500)",
    "2 axes": "na(window=25x25,stride=8x8)",
    "3 axes": "na(window=3x20x9)",
    "bits": "clear(radius=7)",
}


class Kernel(NamedTuple):
    """What decides which kernels a call runs.

    Attributes:
        form: How its masks are said: one of `SMALL`.
        by_head: Whether heads have lists of their own.
        dtype: Of q, k and v.
        head_dim: Channels per head.
        group: Query heads that share a key head.
        samples: Whether there are several.
        heads: Whether there are several key heads.
        grad: Whether gradients are wanted.
    """

    form: str
    by_head: bool
    dtype: torch.dtype
    head_dim: int
    group: int
    samples: bool
    heads: bool
    grad: bool

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, made: Blocks | None, grad: bool, chosen: bool = False) -> Kernel:
        """The kernels of a call; `made` is None for dense attention, `chosen` says that q and k choose the blocks."""
        form, group = "dense", q.shape[2] // k.shape[2]
        if made is not None:
            axes = {1: "1 axis", 2: "2 axes", 3: "3 axes"}
            form = axes[made.words.dims] if isinstance(made.words, Packed) else "chosen" if chosen else "bits"
        by_head = made is not None and made.first is not None
        return cls(form, by_head, q.dtype, q.shape[3], group, q.shape[0] > 1, k.shape[2] > 1, grad)

    def __str__(self) -> str:
        direction = "forward and backward" if self.grad else "forward"
        form, dtype = self.form + (" by head" if self.by_head else ""), str(self.dtype).removeprefix("torch.")
        several = "".join(f", several {name}" for name in ("samples", "heads") if getattr(self, name))
        return f"{direction}, {form}, {dtype}, head_dim {self.head_dim}, {self.group} queries a key head{several}"


def wrong(kernel: Kernel, device: torch.device, attend: Attend) -> str:
    """What is wrong with a kernel on a device, empty if nothing is; tried once.

    Raises:
        RuntimeError: If a CUDA graph is captured, where nothing can be compared.
    """
    key = kernel, device
    if key not in _TRIED:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"FlashAttention-4's kernel ({kernel}) was not tried yet: call it once before capturing")
        _TRIED[key] = _try(kernel, device, attend)
    return _TRIED[key]


# Verdicts of this process.
_TRIED: dict[tuple[Kernel, torch.device], str] = {}


def fault(dtype: torch.dtype, head_dim: int, grad: bool) -> str:
    """What was wrong in this process with a kernel of such calls, empty if nothing was."""
    for (kernel, _), found in _TRIED.items():
        if found and (kernel.dtype, kernel.head_dim, kernel.grad) == (dtype, head_dim, grad):
            return f"{found} ({kernel})"
    return ""


def _try(kernel: Kernel, device: torch.device, attend: Attend) -> str:
    """`wrong`, wherever the call that asks for it stands: in other modes, or in an operator below autograd."""
    plain = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), plain, autograd_inside_operator(), torch.set_grad_enabled(kernel.grad):
        return _compare(kernel, device, attend)


def _compare(kernel: Kernel, device: torch.device, attend: Attend) -> str:
    pattern, layout, leaves, weights = _problem(kernel, device)
    try:
        with package.compiling(str(kernel)):
            ours = _results(lambda q, k, v: attend(q, k, v, pattern, layout, 0.3), leaves, weights, kernel.grad)
            ours = [t.float() for t in ours]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # A compiler and a package that change fail in many ways.
        return f"{type(error).__name__}: {str(error)[:300]}"
    seen = _mask(kernel, pattern, layout, leaves).to(device)
    truth = _results(lambda q, k, v: _dense(q, k, v, seen, 0.3), leaves, weights, kernel.grad)
    for name, a, b in zip(("output", "log-sum-exp", "dq", "dk", "dv"), ours, truth, strict=False):
        off = ((a - b).norm() / b.norm()).item()
        if not off <= LIMIT:
            return f"its {name} is off by {off:.2g} on a small problem"
    return ""


def _problem(kernel: Kernel, device: torch.device) -> tuple[Pattern, Layout, list[torch.Tensor], list[torch.Tensor]]:
    """Pattern, layout, q, k, v and the gradients of output and log-sum-exp; always the same numbers."""
    text, layout = SMALL[kernel.form]
    text = text.format("16x16" if package.generation() > 9 else "8x16")
    heads = kernel.group * (2 if kernel.heads else 1)
    if kernel.by_head:
        text = f"perhead(heads={{0: {OTHER[kernel.form]}}}, rest={text})"
    made = torch.Generator().manual_seed(0)
    batch = 2 if kernel.samples else 1
    numbers = (heads, heads // kernel.group, heads // kernel.group, heads)
    shapes = [(batch, layout.length, number, kernel.head_dim) for number in numbers]
    q, k, v, grad = (torch.randn(shape, generator=made).to(device, kernel.dtype) for shape in shapes)
    leaves = [t.requires_grad_(kernel.grad) for t in (q, k, v)]
    return parse(text), layout, leaves, [grad, torch.randn(grad.shape[:3], generator=made).to(device)]


def _results(attend: Attend, leaves: list[torch.Tensor], weights: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """Output, log-sum-exp and gradients."""
    out, lse = attend(*leaves)
    if not grad:
        return [out, lse]
    outputs = [out, lse]
    gradients = torch.autograd.grad(outputs, leaves, [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)])
    return [out.detach(), lse.detach(), *gradients]


@lru_cache(maxsize=8)
def _seen(pattern: Pattern, layout: Layout) -> torch.Tensor:
    return dense_mask(pattern, layout)


def _mask(kernel: Kernel, pattern: Pattern, layout: Layout, leaves: list[torch.Tensor]) -> torch.Tensor:
    """Which keys a query sees: bool [1 or heads, S, S], of every sample where blocks are chosen."""
    if kernel.form == "chosen":
        q, k, _ = (t.detach() for t in leaves)
        return routed_mask(pattern, layout, q, k, scale=0.3)
    if not kernel.by_head:
        return _seen(pattern, layout)[None]
    number = kernel.group * (2 if kernel.heads else 1)
    return torch.stack([_seen(each, layout) for each in pattern.of_heads(number)])  # type: ignore[attr-defined]


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a mask in single precision."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.float(), *(t.float().repeat_interleave(group, 2) for t in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
    return out, logits.logsumexp(-1).transpose(1, 2)
