"""The GPU backend: any tile plan in one block-sparse kernel, forward and backward."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from visattn.dispatch import Backend, Prepared, current_gpu, overhead, wall
from visattn.keep import CALL_BYTES, STORE
from visattn.kernels.triton import tune
from visattn.kernels.triton.boxes import PARTIAL, QUERY_HALVES, tiled
from visattn.kernels.triton.choosing.tables import lists_by_blocks
from visattn.kernels.triton.config import (
    BY_QUERIES,
    DIRECTIONS,
    SHARING,
    Config,
    block_tokens,
    chosen_by_kernels,
    config,
    largest_head_dim,
    needed_memory,
    packed,
    shorter,
)
from visattn.kernels.triton.eightbit.cost import quantise_us
from visattn.kernels.triton.eightbit.run import attend_8bit, eight_bit, eight_config, fits_8bit
from visattn.kernels.triton.hopper.launch import faster_configs, hopper_config, width
from visattn.layout import Layout
from visattn.operands import in_rows, is_in_rows, wants_gradient
from visattn.patterns import DynamicPattern, ListedPattern, Pattern, RoutedPattern, Routes
from visattn.patterns.choice.merging import BITS
from visattn.patterns.shared_tiles import sharing_tiles
from visattn.problem import PRECISIONS, Call, Problem, Support

if TYPE_CHECKING:
    from visattn.kernels.triton.prepared import Kernels
    from visattn.patterns.choice.blocks import Blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Share of cuDNN's dense rate that visited pairs run at, tiles with a mask weighted by PARTIAL: the general kernel's and
# the Hopper kernel's, measured on an H100 (docs/gpu-notes.md).
RATE, HOPPER_RATE = 0.6, 0.95
# ... and, of all listed pairs, the kernel's whose loop passes over blocks (docs/results/h200-dynamic-skip.json).
SKIP_RATE = 0.3
# What a call keeps the host and, beyond its tiles, the device, in microseconds (docs/performance.md): with lists that
# are known, that kernels choose, and that operators of torch choose.
LISTED_US, CHOSEN_US, ROUTED_US = (35, 12), (75, 110), (650, 120)
# What a dynamic pattern's call keeps the host (docs/results/h200-dynamic.json).
DYNAMIC_CALL_US = 250
# How long one program takes for 128 keys in the general and in the Hopper kernel: the longest list is the least that a
# call takes (fitted to the same calls).
KEYS_US, HOPPER_KEYS_US = 2.0, 1.1
# In 8 bits on Hopper (docs/results/gpu-eightbit.json, an H200): how much faster the kernel is where no tile has a mask
# and where all have, and what a call keeps the host more.
EIGHT_RATE, EIGHT_HOST_US = (1.3, 1.2), 65
# Programs on the second axis of a launch (CUDA C programming guide, "Technical specifications"), where the kernels that
# choose tiles and those of 8 bits have the heads of all samples.
MOST_PAIRS = 2**16 - 1
# Triton runs kernels for Ampere and later.
OLDEST = 80


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU; it decides so when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=16)
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device | None = None) -> int:
    """Compute capability times ten of a CUDA device (the current one if None), 0 for the interpreter."""
    return 0 if interpreted() else _architecture(_index(device))


def _index(device: torch.device | None) -> int:
    """Of a CUDA device; which one is the current one may change between two calls."""
    index = None if device is None else device.index
    return torch.cuda.current_device() if index is None else index


@lru_cache(maxsize=256)
def _tuned(
    pattern: Pattern, layout: Layout, dtype: torch.dtype, head_dim: int, device: torch.device
) -> dict[str, Config]:
    return tune.tuned(pattern, layout, dtype, head_dim, device)


@lru_cache(maxsize=16)
def _device_support(index: int) -> Support:
    """Whether a GPU runs the shipped configurations."""
    if torch.version.hip:
        return Support(False, "its configurations are for NVIDIA GPUs: on AMD they only have been compiled")
    number = _architecture(index)
    if number < OLDEST:
        return Support(False, f"compute capability {number / 10} is below {OLDEST / 10}")
    has, needs = torch.cuda.get_device_properties(index).shared_memory_per_block_optin, needed_memory(number)
    if has < needs:
        return Support(False, f"its kernels need {needs} bytes of shared memory per program and this GPU has {has}")
    return Support(True)


def _architecture_or_common() -> int:
    """The current GPU's, or a common one's where there is none: simulated problems have no device."""
    return architecture() if interpreted() or torch.cuda.is_available() else 90


def fits(device: str, dtype: torch.dtype, head_dim: int) -> Support:
    """Whether the kernels run for tensors of this device type, dtype and head dim."""
    if device != ("cpu" if interpreted() else "cuda"):
        where = "on the CPU only while TRITON_INTERPRET is set" if interpreted() else "on CUDA devices"
        return Support(False, f"q is on {device}, and it runs {where}")
    if dtype not in DTYPES:
        return Support(False, f"{dtype} is none of float16, bfloat16 and float32")
    largest = largest_head_dim(dtype, _architecture_or_common())
    if head_dim > largest or head_dim % 8:
        return Support(False, f"head_dim {head_dim} is not a multiple of 8 up to {largest} ({dtype})")
    return _device_support(_index(None)) if torch.cuda.is_available() and not interpreted() else Support(True)


def pairs_fit(batch: int, heads: int) -> bool:
    """Whether a launch has room for all heads of all samples on its second axis."""
    return batch * heads <= MOST_PAIRS


class Triton(Backend):
    """One kernel a direction walks the tile lists; tokens are read where they lie."""

    name: ClassVar[str] = "triton"
    key_layouts: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Triton, and a GPU or the interpreter."""
        if not _installed():
            return Support(False, "the triton package is not installed")
        if not interpreted() and not torch.cuda.is_available():
            return Support(False, "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Any list of key tiles in half or single precision on Ampere or later, head dims up to 256."""
        support = fits(problem.device, problem.dtype, problem.head_dim)
        if support.ok and not isinstance(problem.pattern, ListedPattern):
            return Support(False, f"{problem.pattern.name} is not a list of key tiles")
        pools = isinstance(problem.pattern, RoutedPattern) and problem.pattern.pools_rest
        if support.ok and pools and not lists_by_blocks(problem.pattern):
            return Support(False, f"it has no pooled keys for what {problem.pattern.name} leaves out")
        paired = isinstance(problem.pattern, RoutedPattern) or problem.precision is not None
        if support.ok and paired and not pairs_fit(problem.batch, problem.heads):
            what = f"{problem.batch} samples of {problem.heads} heads"
            return Support(False, f"{what} are over {MOST_PAIRS} programs side by side: cut the batch")
        if support.ok and problem.precision is not None:
            return fits_8bit(problem, _architecture_or_common(), interpreted())
        return support

    def cost(self, problem: Problem) -> float:
        """Visited tiles, those with a mask a bit more, at a share of the dense rate; never the interpreter."""
        if interpreted():
            return 1e6 * problem.dense_pairs
        number, dtype, head_dim = _architecture_or_common(), problem.dtype, problem.head_dim
        tiles, rate, keys_us = config(number, dtype, head_dim, "forward"), RATE, KEYS_US
        eight = _eight_on_hopper(problem, number)
        if isinstance(problem.pattern, DynamicPattern) and problem.pattern.skip:
            rate = SKIP_RATE
        elif not problem.rpb and (problem.precision is None or eight):
            faster = hopper_config(number, dtype, head_dim, problem.pattern, problem.layout)
            if faster is not None:
                # These kernels compute with more channels than some head dims have.
                tiles, rate, keys_us = faster, HOPPER_RATE * head_dim / width(head_dim), HOPPER_KEYS_US
        shared = sharing_tiles(problem.pattern, problem.layout, SHARING) if problem.precision is None else None
        halves = QUERY_HALVES if tiles.halves else None
        plan = tiled(shared or problem.pattern, problem.layout, tiles.rows, tiles.tile, halves)
        partial = 1 if shared else 1 - plan.full_share
        pairs = problem.dense_pairs / plan.tile_bound * (1 + (PARTIAL - 1) * partial)
        if isinstance(problem.pattern, DynamicPattern) and problem.pattern.pools_rest:
            # Pooled keys by a kernel of the general rate, whatever runs the lists.
            columns = problem.pattern.blocks(problem.layout.grid).columns
            # Two products of a matrix for each head, where values change with keys.
            columns += head_dim if problem.pattern.has_tail else 0
            pairs += problem.dense_pairs * columns / problem.layout.length * rate / RATE
        host_us, device_us = _fixed_us(problem)
        longest = int(plan.lists.counts.max(initial=0)) * plan.keys.capacity / 128
        least = longest * keys_us
        if eight:
            rate *= EIGHT_RATE[0] + (EIGHT_RATE[1] - EIGHT_RATE[0]) * partial
            host_us, device_us = host_us + EIGHT_HOST_US, device_us + quantise_us(problem)
        device = overhead(problem, 0, device_us) + max(pairs / rate, overhead(problem, 0, least))
        return wall(problem, device, 0, host_us)

    def prepare(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, grown: Callable[[], None]
    ) -> Prepared:
        """See `Backend.prepare`."""
        # What is decided while a graph is captured is not tuned, and so not for later calls.
        untuned = tune.enabled() and not _tunes(q)
        # A bias alone may learn, while q, k and v are frozen.
        learns = recorded(q, k, v, call.rpb)
        eight = call.precision is not None
        other = learns and (eight or call.rpb is not None)
        if other or (untuned and not eight) or not _as_they_are(q, k, v, call):
            return super().prepare(q, k, v, call, grown)
        if eight:
            return eight_bit(q, k, v, call, architecture(q.device), grown)
        from visattn.kernels.triton.ready import Ready

        return Ready(kernels_of(q, k, v, call, grown), call, learns)

    def adds_tail(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> bool:
        """See `Backend.adds_tail`; what has gradients is added by operators of torch."""
        slope = isinstance(call.pattern, DynamicPattern) and call.pattern.rest == "slope"
        return slope and call.precision is None and not recorded(q, k, v, call.rpb)

    def keeps_results(self, problem: Problem) -> bool:
        """See `Backend.keeps_results`; the gradients of a bias and of a tail need more."""
        tail = isinstance(problem.pattern, DynamicPattern) and problem.pattern.has_tail
        return not problem.rpb and not tail and self.supports(problem).ok

    def choose(
        self,
        pattern: Pattern,
        q: torch.Tensor,
        k: torch.Tensor,
        blocks: Blocks,
        valid: torch.Tensor | None,
        scale: float,
    ) -> Routes | None:
        """See `visattn.patterns.choice.quick.Chooser`."""
        if not (isinstance(pattern, DynamicPattern) and self._pools(q)):
            return None
        from visattn.kernels.triton.choosing.choose import chosen

        return chosen(pattern, q, k, blocks, valid, scale)

    def means(
        self, x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
    ) -> torch.Tensor | None:
        """See `visattn.patterns.choice.quick.Chooser`."""
        if not self._pools(x) or not x.numel():
            return None
        from visattn.kernels.triton.choosing.choose import block_means

        return block_means(x, grid, box, valid).mean.transpose(1, 2)

    def _pools(self, x: torch.Tensor) -> bool:
        """Whether kernels read such tensors, which no transform of torch.func wraps."""
        support = on_gpu(x) if x.is_cuda else _beside_lists(x.device.type, x.dtype, x.shape[3])
        return support.ok and pairs_fit(x.shape[0], x.shape[2]) and peek_interpreter_stack() is None

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        # Only here, so that listing backends does not import triton.
        from visattn.kernels.triton.ready import Formula, learned

        dtype, given, given_q = q.dtype, call, q
        q, k, v = (in_rows(t) for t in (q, k, v))
        if call.precision is not None:
            return attend_8bit(q, k, v, call, architecture(q.device))
        if interpreted() and dtype == torch.bfloat16:
            # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
            q, k, v, given_q = (t.float() for t in (q, k, v, given_q))
        if call.scale < 0:
            q = -q
        key_mask = None if call.key_mask is None else call.key_mask.contiguous()
        rpb = None if call.rpb is None else call.rpb.to(torch.float32).flatten(1).contiguous()
        call = replace(call, scale=abs(call.scale), key_mask=key_mask, rpb=rpb)
        kernels, learns = _kept_kernels(q, k, v, call), recorded(q, k, v, rpb)
        routes = isinstance(call.pattern, RoutedPattern)
        routed = kernels.lists(q, k, v, key_mask, learns, given.scale, given_q) if routes else None
        if learns:
            out, lse = learned(q, k, v, rpb, key_mask, kernels, Formula(given), call.lse, routed)
        else:
            out, lse = kernels.forward(q, k, v, key_mask, rpb, call.lse, routed)
            lse = None if lse is None else lse.transpose(1, 2)
        return out if out.dtype == dtype else out.to(dtype), lse


def _fixed_us(problem: Problem) -> tuple[float, float]:
    """What a call keeps the host and the device beyond its tiles, in microseconds."""
    if not isinstance(problem.pattern, RoutedPattern):
        return LISTED_US
    if isinstance(problem.pattern, DynamicPattern):
        from visattn.kernels.triton.choosing.cost import MERGE_US, choosing_us, sharing_us

        shared = sharing_us(problem)
        return DYNAMIC_CALL_US + (MERGE_US if shared else 0), choosing_us(problem) + shared
    return CHOSEN_US if chosen_by_kernels(problem.pattern, problem.layout, problem.key_mask) else ROUTED_US


def _eight_on_hopper(problem: Problem, number: int) -> bool:
    """Whether Hopper's own kernel of 8 bits runs a call; what nobody has timed counts as that of 16 bits."""
    about = problem.dtype, problem.head_dim, problem.pattern, problem.layout, problem.key_mask
    return problem.precision is not None and eight_config(number, *about).hopper


def _as_they_are(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> bool:
    """Whether the kernels take the tensors of a call without a change."""
    mask, rpb = call.key_mask, call.rpb
    rows = all(is_in_rows(t) for t in (q, k, v))
    numbers = call.scale >= 0 and not (interpreted() and q.dtype == torch.bfloat16)
    others = (mask is None or mask.is_contiguous()) and (rpb is None or rpb.dtype == torch.float32)
    return rows and numbers and others and (rpb is None or rpb.is_contiguous())


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd, in either direction, or a transform of torch.func has to see a call on these tensors."""
    if wants_gradient(*tensors):
        return True
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def kernels_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, grown: Callable[[], None]) -> Kernels:
    """The kernels of calls like this one."""
    from visattn.kernels.triton.prepared import Kernels

    tf32 = bool(torch.backends.cuda.matmul.allow_tf32)
    return Kernels(q, k, v, call, tf32, launches, grown)


def _kept_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Kernels:
    """The same, kept for the next call like it."""
    mask, tf32 = call.key_mask, bool(torch.backends.cuda.matmul.allow_tf32)
    key = (
        kernels_of, call.pattern, call.layout, call.scale, q.dtype, q.device, q.shape, k.shape,
        q.stride(), k.stride(), v.stride(), mask is None, call.rpb is None, tf32, _tunes(q),
    )  # fmt: skip
    entry = STORE.find(key)
    if entry is None:
        entry = STORE.put(key, kernels_of(q, k, v, call, lambda: STORE.weigh(key)), CALL_BYTES)
    return entry.value


def on_gpu(q: torch.Tensor) -> Support:
    """Whether kernels beside the tile lists run for queries [B, S, H, D] like these; the interpreter is for tests."""
    if not q.is_cuda:
        return Support(False, "they are for GPUs")
    return _on_gpu(q.dtype, q.shape[3], current_gpu("cuda"))


def _beside_lists(device: str, dtype: torch.dtype, head_dim: int) -> Support:
    """Whether kernels run for tensors of this device type, dtype and head dim, whatever the call."""
    support = backend.available()
    return fits(device, dtype, head_dim) if support.ok else support


@lru_cache(maxsize=256)
def _on_gpu(dtype: torch.dtype, head_dim: int, gpu: int) -> Support:
    """The same where this GPU is the current one: asking torch and the environment takes longer than a launch."""
    return _beside_lists("cuda", dtype, head_dim)


def _tunes(q: torch.Tensor) -> bool:
    """Whether configurations are timed for calls with such queries: the user asks for it, and nothing is captured."""
    return tune.enabled() and q.is_cuda and not torch.cuda.is_current_stream_capturing()


def launches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> dict[str, Config]:
    """The launch configuration of each direction: the table's or the tuned one, or that of a Hopper kernel."""
    number, dtype, head_dim = architecture(q.device), q.dtype, q.shape[3]
    tokens = dict.fromkeys(DIRECTIONS) | block_tokens(call.pattern, call.layout)
    configs = {d: config(number, dtype, head_dim, d, tokens[d]) for d in DIRECTIONS}
    if _tunes(q):
        configs = _tuned(call.pattern, call.layout, dtype, head_dim, q.device)
    if sharing_tiles(call.pattern, call.layout, SHARING) is not None:
        # Tiles that blocks share have no more tokens than a word has bits.
        configs = configs | {d: shorter(configs[d], BITS) for d in BY_QUERIES if number}
    elif (keys := tokens["key_grad"]) is not None:
        configs = configs | {d: packed(configs[d], keys) for d in BY_QUERIES}
    # A new dict: the tuned one is kept for other calls, which may have a mask.
    return configs | faster_configs(q, k, v, call, number)


backend = Triton()
