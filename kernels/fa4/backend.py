"""FlashAttention-4's kernels on tile plans: one launch a direction, and the moves into tile order around it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from visattn.dispatch import BACKENDS, Backend, cheapest, overhead, unlisted, visited_pairs, wall
from visattn.kernels.fa4 import chosen, package
from visattn.kernels.fa4.blocks import Blocks, blocks, patterns_of, plans_of, same_tiles
from visattn.kernels.fa4.trial import Kernel, fault, wrong
from visattn.kernels.fa4.words import Bits, packs
from visattn.kernels.second_order import lists_with_formula
from visattn.layout import Layout
from visattn.operands import wants_gradient
from visattn.patterns import DynamicPattern, ListedPattern, Pattern, PerHead
from visattn.plans import TilePlan
from visattn.problem import Call, Problem, Support, sees_all
from visattn.tiling import Tiling

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 128
# On an H200 4.0.0b36 gave wrong dQ along lists for 40, 72 and 80 channels, and right ones for 64, 96 and 128.
GRAD_HEAD_DIMS = 32
# Entries of a table of pairs of tiles, 64 MiB.
LARGEST_TABLE = 2**24
# Slots of a query tile by generation: Blackwell's kernels compute two tiles of 128 queries side by side.
ROWS = {9: 128, 10: 256, 11: 256}


class FlashAttention4(Backend):
    """Any list of tiles, and dense attention, in the kernels of flash-attn-4: Hopper, and untested Blackwell."""

    name: ClassVar[str] = "fa4"
    key_layouts: ClassVar[bool] = True

    def available(self) -> Support:
        """Whether flash-attn-4 imports and has kernels for the GPU."""
        return package.here()

    def supports(self, problem: Problem) -> Support:
        """Patterns whose lists are known before q and k, of all heads or of each, in half precision."""
        reason = _unlisted(problem) or _refusal(problem)
        if not reason and package.version() is None:
            return package.here()
        reason = reason or fault(problem.dtype, problem.head_dim, problem.grad) or _table_refusal(problem)
        return Support(not reason, reason)

    def cost(self, problem: Problem) -> float:
        """Visited pairs at the rate of the kernels, dearer in partial blocks, and the moves into tile order."""
        if problem.is_dense:
            return wall(problem, problem.dense_pairs / DENSE_RATE, cpu_ms=0, host_us=HOST_US)
        plans = _plans(problem)
        pairs = 0.0
        for pattern, tiles in plans:
            dearer = PARTIAL[packs(pattern, problem.layout)]
            partial = 1 + (1 - tiles.full_share) * (dearer - 1)
            pairs += visited_pairs(problem, tiles) * partial / len(plans) / RATE[problem.grad]
        moved = sum(_moved(side) for side in (plans[0][1].queries, plans[0][1].keys, plans[0][1].keys))
        tokens = max(1, problem.batch) * problem.heads * problem.layout.length
        # With gradients twice as many, of which a call of three and a half forwards has as many a forward.
        copies = (moved + _moved(plans[0][1].queries)) * (2 / 3.5 if problem.grad else 1)
        seconds = copies * tokens * problem.head_dim * problem.dtype.itemsize / COPY_RATE
        host_us, device_us = HOST_US, 1e6 * seconds
        if isinstance(problem.pattern, DynamicPattern):
            host_us, device_us = host_us + CHOSEN_US[0], device_us + CHOSEN_US[1]
        return wall(problem, pairs + overhead(problem, 0, device_us), cpu_ms=0, host_us=host_us)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        problem = Problem.of(q, k, v, call)
        made = _blocks(call.pattern, call.layout, q)
        kernel = Kernel.of(q, k, made, problem.grad, isinstance(call.pattern, DynamicPattern))
        found = wrong(kernel, q.device, _small)
        if found:
            others = (each for each in BACKENDS.usable().values() if each.name != self.name)
            other = cheapest(problem, others)
            warnings.warn(f"{other.name} runs what FlashAttention-4 gets wrong here: {found}", stacklevel=2)
            return other.run(q, k, v, call)
        return lists_with_formula(partial(_attend, made), q, k, v, call)

    def compiled(self) -> str:
        """See `Backend.compiled`."""
        times = package.compiled()
        if not times:
            return ""
        return f"{len(times)} kernels took {sum(times.values()):.0f} s to compile, kept in {package.folder()}"


# Rate of visited pairs in full blocks, of a forward and with its backward, over cuDNN's dense attention, and what a
# pair costs in partial blocks by intervals over one in full blocks: flash-attn-4 4.0.0b36 on an H200, windows with 128
# channels on 256x256 and 30x48x80 tokens (forward alone 1.02; 1.35 and 1.34; docs/results/h200.json, h200-fa4.json).
# Dense attention's rate is that of an H100; what bits cost, and what a call keeps the host, are assumed.
RATE, DENSE_RATE = {False: 1.0, True: 1.03}, 1.1
PARTIAL = {False: 4.0, True: 1.35}
HOST_US = 200
# What choosing blocks (docs/results/h200-dynamic.json) and writing their lists (assumed) keep the host and the device.
CHOSEN_US = (400, 160)
# Bytes of a tensor that is moved into tile order or back per second of an H200: of a whole call less its launch.
COPY_RATE = 2.3e12


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by FlashAttention-4, untried; arguments as in `Backend.run`."""
    return _attend(_blocks(call.pattern, call.layout, q), q, k, v, call)


def _blocks(pattern: Pattern, layout: Layout, q: torch.Tensor) -> Blocks | None:
    """The lists of a call, None for dense attention."""
    if sees_all(pattern, layout):
        return None
    heads = q.shape[2] if isinstance(pattern, PerHead) else 1
    return blocks(pattern, layout, heads, ROWS[package.generation()], q.device)


def _attend(
    made: Blocks | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    if made is not None and isinstance(call.pattern, DynamicPattern):
        grad = wants_gradient(q, k, v)
        made = chosen.with_choice(made, call.pattern, call.layout, q, k, call.scale, grad)
    if made is None:
        found, reason = package.load()
        assert found is not None, reason
        q, scale = _positive(q, call.scale)
        # Lists of blocks have no deterministic backward on Hopper; dense attention has.
        strict = torch.are_deterministic_algorithms_enabled()
        out, lse = found.attend(q, k, v, softmax_scale=scale, return_lse=True, deterministic=strict)
        return out, lse.transpose(1, 2)
    out, lse = attend_slots(made, made.queries.into(q), made.keys.into(k), made.keys.into(v), call.scale)
    return made.queries.back(out), made.queries.back(lse)


def attend_slots(
    made: Blocks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention along lists of tensors in tile order, untried.

    Args:
        made: The lists.
        q: Queries [B, query slots, H, D].
        k: Keys [B, key slots, Hkv, D].
        v: Values likewise.
        scale: Factor on the logits.

    Returns:
        Output [B, query slots, H, D] and log-sum-exp [B, query slots, H]; of slots without a token anything finite.
    """
    found, reason = package.load()
    assert found is not None, reason
    q, scale = _positive(q, scale)
    forward, backward = (found.lists(*lists, block_size=made.block_size) for lists in (made.forward, made.backward))
    out, lse = found.attend(
        q,
        k,
        v,
        softmax_scale=scale,
        # The log-sum-exp is always asked for: with and without are two kernels.
        return_lse=True,
        # Packed query heads of a key head would make rows of several tokens, which tiles then do not divide.
        pack_gqa=False,
        mask_mod=_mod(made),
        aux_tensors=made.tensors,
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
    )
    return out, lse.transpose(1, 2)


def _small(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(q, k, v, Call(pattern, layout, scale))


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same logits with a scale above zero: the kernels take the largest product for the largest logit."""
    if scale > 0:
        return q, scale
    return (q * 0, 1.0) if scale == 0 else (-q, -scale)


def _mod(made: Blocks) -> Any:
    """The mask function of lists; it stands on the package."""
    from visattn.kernels.fa4 import mods

    by_head, words = made.first is not None, made.words
    return mods.bits_mod(words.rows, by_head) if isinstance(words, Bits) else mods.intervals_mod(words.guards, by_head)


def _plans(problem: Problem) -> list[tuple[ListedPattern, TilePlan]]:
    """The pattern and the plan of each head, of one head where all have the same."""
    rows = ROWS.get(package.generation(), 128)
    of_head = patterns_of(problem.pattern, problem.heads)
    patterns = list(dict.fromkeys(of_head))
    plans = dict(zip(patterns, plans_of(patterns, problem.layout, rows), strict=True))
    return [(each, plans[each]) for each in of_head]


def _moved(tiling: Tiling) -> bool:
    return not np.array_equal(tiling.tokens.ravel(), np.arange(tiling.length))


def _unlisted(problem: Problem) -> str:
    """Why the pattern is no list that is known before q and k, or that blocks of them choose; empty if it is."""
    if isinstance(problem.pattern, DynamicPattern) and not problem.is_dense:
        return chosen.refusal(problem.pattern, problem.layout, ROWS.get(package.generation(), 128))
    if not isinstance(problem.pattern, PerHead):
        return unlisted(problem)
    found = (unlisted(replace(problem, pattern=each)) for each in problem.pattern.patterns)
    return next((reason for reason in found if reason), "")


def _refusal(problem: Problem) -> str:
    """Why the kernels do not take a call's tensors, empty if they do."""
    if problem.device != "cuda":
        return f"it runs on cuda, not on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, not in {problem.dtype}"
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= LARGEST_HEAD_DIM:
        return f"its blocks take 8 to {LARGEST_HEAD_DIM} channels per head in steps of 8, not {problem.head_dim}"
    if problem.grad and problem.head_dim % GRAD_HEAD_DIMS and not problem.is_dense:
        return f"its backward is wrong for head dims that are no multiple of {GRAD_HEAD_DIMS}, like {problem.head_dim}"
    if problem.key_mask:
        return "a key mask would put every block through its mask function"
    if problem.rpb:
        return "its score functions give no gradient that a relative position bias could use"
    if problem.grad and problem.strict and not problem.is_dense:
        return "its backward along lists adds in any order, and torch.use_deterministic_algorithms is on"
    return ""


def _table_refusal(problem: Problem) -> str:
    """Why a plan cannot be said in its terms, empty if it can."""
    if problem.is_dense:
        return ""
    plans = dict(_plans(problem))
    if not same_tiles(list(plans.values())):
        return "heads with other tiles (dilation, a flat sequence) cannot be one launch"
    tiles = next(iter(plans.values()))
    entries = len(plans) * tiles.queries.tiles * tiles.keys.tiles
    if entries > LARGEST_TABLE and not all(packs(each, problem.layout) for each in plans):
        return f"its table of {entries} pairs of tiles has over {LARGEST_TABLE} entries"
    return ""


backend = FlashAttention4()
