"""First launches of the kernels along tile lists; those of calls like an earlier one are in `prepared`."""

from __future__ import annotations

from typing import Any

from visattn.kernels.triton import arguments
from visattn.kernels.triton.arguments import Operands, Work
from visattn.kernels.triton.config import Config
from visattn.kernels.triton.hopper import launch as hopper_launch
from visattn.kernels.triton.lists.bias_grad import bias_gradients
from visattn.kernels.triton.lists.delta import deltas
from visattn.kernels.triton.lists.forward import attend
from visattn.kernels.triton.lists.key_grad import key_gradients
from visattn.kernels.triton.lists.positions import partners
from visattn.kernels.triton.lists.query_grad import query_gradients
from visattn.kernels.triton.start import Launch, launch_like, on, programs

# Launch configuration of the kernels without matrix products.
SMALL = Config(32, 1, 4, 1)
HOPPER_LAUNCHES = {
    "forward": hopper_launch.forward_launch,
    "key_grad": hopper_launch.key_launch,
    "query_grad": hopper_launch.query_launch,
}
# Kernels of the one-pass backward.
ONE_PASS_LAUNCHES = {
    "one_pass": hopper_launch.one_pass_launch,
    "finish": hopper_launch.finish_launch,
    "dense_grad": hopper_launch.dense_launch,
}
# Operands of each kernel that are other tensors in each call, in the order in which their addresses are passed.
CHANGING = {
    "forward": ("q", "k", "v", "out", "lse", "rpb", "key_mask", "taken"),
    "delta": ("out", "grad_out", "delta", "grad_lse"),
    "key_grad": ("q", "k", "v", "grad_out", "lse", "delta", "grad_k", "grad_v", "rpb", "key_mask"),
    "query_grad": ("q", "k", "v", "grad_out", "lse", "delta", "grad_q", "rpb", "key_mask"),
    "one_pass": ("q", "k", "v", "grad_out", "lse", "delta", "grad_k", "grad_v", "sums", "turns"),
    "finish": ("sums", "grad_q"),
    "dense_grad": ("q", "k", "v", "grad_out", "lse", "delta", "grad_q"),
}
# Arguments that are lists of a routed pattern, the last one where a query tile holds several blocks.
LISTS = ("bounds", "bases", "mask_ids", "words")


def start_first(direction: str, key: Any, t: Operands, work: Work) -> None:
    """Start a kernel by Triton's launcher and get it ready.

    Args:
        direction: One of `CHANGING`.
        key: Whatever tells calls that are alike apart for this kernel.
        t: The operands, results among them.
        work: What calls that are alike share.
    """
    tensors = t.given(*CHANGING[direction])
    if t.routed is not None and direction != "delta":
        tensors |= zip(LISTS, t.routed.program(direction).own_lists, strict=False)
    work.starts.first((direction, key), tensors, _first(direction, t, work))


def _first(direction: str, t: Operands, work: Work) -> Launch:
    if direction == "delta":
        assert t.out is not None and t.grad_out is not None and t.delta is not None
        given = arguments.delta_arguments(t.out, t.grad_out, t.grad_lse, t.delta)
        return Launch(deltas, arguments.delta_programs(t.out, given), given, SMALL.warps, SMALL.stages)
    if direction in ONE_PASS_LAUNCHES:
        return ONE_PASS_LAUNCHES[direction](t, work)
    config = work.configs[direction]
    if config.hopper:
        return HOPPER_LAUNCHES[direction](t, work)
    if direction == "forward":
        kernel, given = attend, arguments.forward_arguments(t, work)
    else:
        kernel = key_gradients if direction == "key_grad" else query_gradients
        given = arguments.gradient_arguments(direction, t, work)
    return Launch(kernel, programs(given), given, config.warps, config.stages)


def run_in_one_pass(key: Any, t: Operands, work: Work) -> None:
    """Fill the gradients of q, k and v in one pass over the lists.

    Args:
        key: As in `start_first`.
        t: The operands, results among them.
        work: What calls that are alike share.
    """
    t.sums, t.turns = hopper_launch.one_pass_buffers(t, work)
    steps = ["delta", "one_pass", "finish"]
    if work.program("query_grad", t).dense_rows:
        steps.append("dense_grad")
    for direction in steps:
        start = work.starts.ready.get((direction, key))
        if start is None:
            start_first(direction, key, t, work)
        else:
            start([tensor.data_ptr() for tensor in t.given(*CHANGING[direction]).values()])


def run_bias_gradients(t: Operands, work: Work) -> Any:
    """Run the kernel of the bias' gradient, which has a part for each sample; returns their sum."""
    assert t.rpb is not None
    partner = partners(work.pattern, work.layout, t.q.device)
    parts = t.rpb.new_empty((t.q.shape[0], *t.rpb.shape))
    given = arguments.bias_arguments(t, partner, work) | {"grad_rpb": parts}
    with on(t.q.device):
        launch_like(bias_gradients, (parts.numel(),), given, SMALL.warps, SMALL.stages)
    return parts.sum(0)
