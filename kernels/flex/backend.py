"""torch's FlexAttention: the tile plan as a BlockMask, tokens gathered into tile order."""

from __future__ import annotations

import shutil
from typing import Any, ClassVar

import torch
from torch.nn.attention.flex_attention import AuxRequest

from visattn.dispatch import Backend, overhead, unlisted, visited_pairs
from visattn.kernels.flex.blocks import blocks, compiled, score_mod, tile_plan
from visattn.kernels.flex.visible import is_product
from visattn.kernels.second_order import lists_with_formula
from visattn.problem import Call, Problem, Support

# Slots of a tile. On CUDA every block size of torch's own configurations divides 128.
TILE = {"cpu": 64, "cuda": 128}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# FlexAttention keeps int32 tables of all pairs of tiles; one of this many entries is 64 MiB.
LARGEST_TABLE = 2**24


class Flex(Backend):
    """Any list of tiles, in a kernel that inductor generates: the first call of each shape waits for the compiler."""

    name: ClassVar[str] = "flex"
    key_layouts: ClassVar[bool] = True

    def available(self) -> Support:
        """Whether torch can compile here: without the compiler FlexAttention builds the whole score matrix."""
        if torch._dynamo.config.disable or not torch._dynamo.is_dynamo_supported():
            return Support(
                False, "torch.compile is switched off or does not run here, and eager FlexAttention is dense"
            )
        return Support(True) if torch.cuda.is_available() else _cpu_compiler()

    def supports(self, problem: Problem) -> Support:
        """Patterns that are lists of tiles; on a CPU without gradients and log-sum-exp."""
        reason = unlisted(problem) or _refusal(problem)
        if reason:
            return Support(False, reason)
        if problem.device == "cpu" and not _cpu_compiler().ok:
            return _cpu_compiler()
        tiles = tile_plan(problem.pattern, problem.layout, TILE[problem.device])
        if tiles.queries.tiles * tiles.keys.tiles > LARGEST_TABLE:
            pairs = f"{tiles.queries.tiles} x {tiles.keys.tiles}"
            return Support(False, f"its table of {pairs} pairs of tiles has over {LARGEST_TABLE} entries")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """Visited slots at the generated kernel's rate, dearer in partial tiles, and the gathers around it."""
        tiles = tile_plan(problem.pattern, problem.layout, TILE[problem.device])
        full = 0.0 if problem.key_mask else tiles.full_share
        fast, slow = RATES[problem.device, is_product(problem.pattern)]
        rate = (full * fast + (1 - full) * slow) * (1.5 if problem.rpb else 1.0)
        return visited_pairs(problem, tiles) * rate + overhead(problem, *OVERHEAD)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        return lists_with_formula(attend, q, k, v, call)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by FlexAttention; arguments as in `Backend.run`."""
    found = blocks(call.pattern, call.layout, TILE[q.device.type], q.device)
    heads_first = [side.gather(t).transpose(1, 2) for side, t in ((found.queries, q), (found.keys, k), (found.keys, v))]
    key_mask = None if call.key_mask is None else found.keys.gather(call.key_mask)
    bias = None if call.rpb is None else score_mod(found, call.pattern, call.layout, call.rpb)
    run = compiled(_signature([*heads_first, *found.visible.tensors, key_mask, call.rpb], call))
    with torch.autocast(q.device.type, enabled=False):
        out, aux = run(
            *heads_first,
            score_mod=bias,
            block_mask=found.masked(key_mask),
            scale=call.scale,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=AuxRequest(lse=call.lse),
            # Without this a short sequence runs a decoding kernel with other limits.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if q.is_cuda else None,
        )
    out = out.transpose(1, 2).index_select(1, found.slot_of_token)
    return out, aux.lse.transpose(1, 2).index_select(1, found.slot_of_token) if call.lse else None


# Time per visited pair over dense SDPA's, in tiles without and with a mask, which is looked up, or with True a product
# of intervals: on an H100 from the cases of docs/performance.md, on a CPU estimates (scripts/bench/backends.py).
RATES = {
    ("cpu", False): (1.5, 3.0),
    ("cpu", True): (1.5, 3.0),
    ("cuda", False): (1.75, 14.0),
    ("cuda", True): (1.75, 4.0),
}
# Per call, in milliseconds on a CPU and microseconds on CUDA. It carries a share of the compilation, which takes
# seconds for each shape, as if a shape were called a hundred times on a CPU and a few thousand times on CUDA.
OVERHEAD = (60.0, 2000.0)


def _refusal(problem: Problem) -> str:
    """Why FlexAttention itself cannot run a call, empty if it can."""
    if problem.device not in TILE:
        return f"it runs on {' and '.join(TILE)}, not on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {problem.dtype}"
    if problem.device == "cpu":
        if problem.grad:
            return "FlexAttention has no backward on a CPU"
        if problem.lse:
            return "FlexAttention returns no log-sum-exp on a CPU"
    elif not 16 <= problem.head_dim <= 256:
        return f"its CUDA kernel takes 16 to 256 channels per head, not {problem.head_dim}"
    return ""


def _cpu_compiler() -> Support:
    """Whether inductor can compile FlexAttention for this CPU."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return Support(False, "FlexAttention on a CPU needs AVX2")
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return Support(False, "FlexAttention on a CPU needs a C++ compiler (g++)")
    return Support(True)


def _signature(tensors: list[torch.Tensor | None], call: Call) -> tuple[Any, ...]:
    """Everything about a call that makes the compiler specialise."""
    grad = torch.is_grad_enabled()
    traits = [
        None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device, grad and t.requires_grad)
        for t in tensors
    ]
    return *traits, call.lse, call.scale, grad, torch.is_inference_mode_enabled()


backend = Flex()
