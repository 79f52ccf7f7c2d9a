"""Choosing regions for calls that are alike, in three kernels and two allocations; other lists when gradients come."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.lists.program import Program
from visattn.kernels.triton.routing.choose import choose_regions
from visattn.kernels.triton.routing.means import head_products, region_means
from visattn.kernels.triton.routing.tables import Side, region_tokens, side
from visattn.kernels.triton.routing.turn import turn_lists
from visattn.kernels.triton.start import ALIGNMENT, Launch, Starts
from visattn.patterns.routing import Routing

# Rows and channels of a step of the products; entries that are copied or looked at at once.
ROWS, CHANNELS, STEP = 16, 32, 128
# Numbers that a program of the means adds at once: more of them spill at head dim 256.
MEANS = 2048
WARPS = 4


class Space:
    """Where the pieces of one allocation lie: int32 and float32 numbers.

    Args:
        pieces: Numbers of each piece by name, in their order.
        device: Where they are.
    """

    def __init__(self, pieces: dict[str, int], device: torch.device) -> None:
        unit = ALIGNMENT // 4
        self.offsets: dict[str, int] = {}
        self._sizes, self._device, end = pieces, device, 0
        for name, number in pieces.items():
            self.offsets[name] = end
            end += -(-number // unit) * unit
        self._total = (max(1, end),)

    def empty(self) -> torch.Tensor:
        """Memory for them: int32."""
        return torch.empty_strided(self._total, (1,), dtype=torch.int32, device=self._device)

    def addresses(self, memory: torch.Tensor, *names: str) -> list[int]:
        """Where pieces begin."""
        start = memory.data_ptr()
        return [start + 4 * self.offsets[name] for name in names]

    def piece(self, memory: torch.Tensor, name: str, *shape: int) -> torch.Tensor:
        """A piece as a tensor."""
        return memory[self.offsets[name] :][: self._sizes[name]].view(shape)


class Chosen:
    """What one call chose, and the lists that follow.

    Args:
        router: Of calls like it.
        memory: Of its choice and forward lists.
    """

    def __init__(self, router: Router, memory: torch.Tensor) -> None:
        self.router, self.memory = router, memory
        self._lists: dict[str, torch.Tensor] = {}
        # Each once: what starts kernels again tells tensors apart by what they are, not by where.
        self._programs: dict[str, Program] = {}

    def choice(self) -> torch.Tensor:
        """The regions that each region sees, best first: int64 [B, regions, chosen]."""
        return self.router.choice(self)

    def addresses(self, direction: str) -> list[int]:
        """Bounds, bases and masks of a direction."""
        return self.router.addresses(self, direction)

    def program(self, direction: str) -> Program:
        """The same with their tensors."""
        if direction not in self._programs:
            self._programs[direction] = self.router.program(self, direction)
        return self._programs[direction]

    def lists(self, direction: str) -> torch.Tensor:
        """The memory of a direction's lists, filled where they are not yet."""
        if direction == "forward" or self.router.shared[direction]:
            return self.memory
        if direction not in self._lists:
            self._lists[direction] = self.router.fill(self, direction)
        return self._lists[direction]


class Router:
    """The choice of a routed call and its lists.

    Args:
        q: Queries of the first call.
        k: Its keys.
        work: What calls that are alike share.
        starts: Their kernels.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, work: Work, starts: Starts) -> None:
        pattern, layout = work.pattern, work.layout
        assert isinstance(pattern, Routing)
        self._starts, self._batch, self._heads, self._kv_heads = starts, q.shape[0], q.shape[2], k.shape[2]
        self._regions = math.prod(pattern.parts(layout.grid))
        self._chosen = pattern.chosen(layout.grid)
        self._tokens = region_tokens(pattern, layout.prefix, layout.grid, q.device)
        directions = ("forward", "query_grad", "key_grad")
        self._sides = {d: side(pattern, work.plan(d), d == "key_grad", q.device) for d in directions}
        # Where query tiles are the same in both directions, so are their lists.
        self.shared = {d: self._sides[d] is self._sides["forward"] for d in directions}
        means = self._batch * self._regions * q.shape[3]
        lists = self._batch * self._sides["forward"].length
        products = self._batch * self._heads * self._regions**2
        # Apart from the rest, which lives until the backward.
        self._scratch = Space(
            {"mean_q": means * self._heads, "mean_k": means * self._kv_heads, "products": products}, q.device
        )
        choice = self._batch * self._regions * self._chosen
        self._space = Space({"choice": choice, "bases": lists, "mask_ids": lists}, q.device)
        self._spaces = {"forward": self._space} | {d: self._own_space(d, q.device) for d in directions[1:]}

    def _own_space(self, direction: str, device: torch.device) -> Space:
        own = self._sides[direction]
        if self.shared[direction]:
            return self._space
        bounds = self._batch * own.base.row_tiles * 4 if direction == "key_grad" else 0
        lists = self._batch * own.length
        return Space({"bounds": bounds, "bases": lists, "mask_ids": lists}, device)

    def choose(self, q: torch.Tensor, k: torch.Tensor) -> Chosen:
        """Choose for q and k, and write the lists of query tiles."""
        scratch, memory = self._scratch.empty(), self._space.empty()
        ready = self._starts.ready
        # Queries may lie in another way than those that attend: with a negative scale they are not the same tensor.
        means, products, choice = ready.get(("means", q.stride())), ready.get("products"), ready.get("choice")
        made = Chosen(self, memory)
        at_q, at_k = q.data_ptr(), k.data_ptr()
        if means is None or products is None or choice is None or (at_q | at_k) & (ALIGNMENT - 1):
            self._first_choice(q, k, scratch, memory)
            return made
        between = self._scratch.addresses(scratch, "mean_q", "mean_k", "products")
        means([at_q, at_k, *between[:2]])
        products(between)
        choice([between[2], *self._space.addresses(memory, "choice", "bases", "mask_ids")])
        return made

    def choice(self, made: Chosen) -> torch.Tensor:
        """What a call chose."""
        return self._space.piece(made.memory, "choice", self._batch, self._regions, self._chosen).long()

    def addresses(self, made: Chosen, direction: str) -> list[int]:
        """Bounds, bases and masks of a direction."""
        space, lists = self._spaces[direction], made.lists(direction)
        if direction == "key_grad":
            return space.addresses(lists, "bounds", "bases", "mask_ids")
        return [self._sides[direction].base.bounds.data_ptr(), *space.addresses(lists, "bases", "mask_ids")]

    def program(self, made: Chosen, direction: str) -> Program:
        """The lists of a direction with their tensors."""
        own, space, lists = self._sides[direction], self._spaces[direction], made.lists(direction)
        bases, masks = (space.piece(lists, name, self._batch, own.length) for name in ("bases", "mask_ids"))
        found = replace(own.base, bases=bases, mask_ids=masks, list_batch=own.length)
        if direction != "key_grad":
            return found
        bounds = space.piece(lists, "bounds", self._batch, own.base.row_tiles, 4)
        return replace(found, bounds=bounds, bounds_batch=bounds[0].numel() if self._batch > 1 else 0)

    def fill(self, made: Chosen, direction: str) -> torch.Tensor:
        """Write the lists of a direction that has none."""
        space, own = self._spaces[direction], self._sides[direction]
        memory = space.empty()
        start = self._starts.ready.get(("lists", direction))
        names = ("bounds", "bases", "mask_ids") if direction == "key_grad" else ("bases", "mask_ids")
        if start is not None:
            start([*self._space.addresses(made.memory, "choice"), *space.addresses(memory, *names)])
            return memory
        choice = self._space.piece(made.memory, "choice", -1)
        tensors = {"choice": choice} | {name: space.piece(memory, name, -1) for name in names}
        if direction == "key_grad":
            launch = self._turn(own, tensors)
        else:
            launch = self._write(own, {"products": choice, **tensors}, False)
        self._starts.first(("lists", direction), tensors, launch)
        return memory

    def _first_choice(self, q: torch.Tensor, k: torch.Tensor, scratch: torch.Tensor, memory: torch.Tensor) -> None:
        keys = {"means": ("means", q.stride()), "products": "products", "choice": "choice"}
        for name, tensors in self._operands(q, k, scratch, memory).items():
            self._starts.first(keys[name], tensors, self._launch(name, tensors, q, k))

    def _operands(
        self, q: torch.Tensor, k: torch.Tensor, scratch: torch.Tensor, memory: torch.Tensor
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors that change from call to call of each kernel that chooses."""
        whole, names = scratch.view(torch.float32), ("mean_q", "mean_k", "products")
        mean_q, mean_k, products = (self._scratch.piece(whole, name, -1) for name in names)
        lists = {name: self._space.piece(memory, name, -1) for name in ("choice", "bases", "mask_ids")}
        return {
            "means": {"q": q, "k": k, "mean_q": mean_q, "mean_k": mean_k},
            "products": {"mean_q": mean_q, "mean_k": mean_k, "products": products},
            "choice": {"products": products, **lists},
        }

    def _launch(self, name: str, tensors: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> Launch:
        if name == "means":
            return self._means(q, k, tensors)
        if name == "products":
            return self._products(q.shape[3], tensors)
        return self._write(self._sides["forward"], tensors, True)

    def first_launches(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, Launch]:
        """What would be launched for these, without launching it: for compilers ahead of time."""
        memory, own = self._space.empty(), self._sides["key_grad"]
        operands = self._operands(q, k, self._scratch.empty(), memory)
        made = {name: self._launch(name, t, q, k) for name, t in operands.items()}
        space = self._spaces["key_grad"]
        lists = {name: space.piece(space.empty(), name, -1) for name in ("bounds", "bases", "mask_ids")}
        return made | {"turned": self._turn(own, {"choice": self._space.piece(memory, "choice", -1), **lists})}

    def _means(self, q: torch.Tensor, k: torch.Tensor, tensors: dict[str, Any]) -> Launch:
        width = block_dim(q.shape[3])
        given = {
            **tensors, "tokens": self._tokens,
            "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2),
            "k_batch": k.stride(0), "k_token": k.stride(1), "k_head": k.stride(2),
            "heads": self._heads, "kv_heads": self._kv_heads, "regions": self._regions, "slots": self._tokens.shape[1],
            "HEAD_DIM": q.shape[3], "BLOCK_DIM": width, "SLOTS": min(ROWS, MEANS // width),
        }  # fmt: skip
        return Launch(region_means, (self._regions, self._heads + self._kv_heads, self._batch), given, WARPS)

    def _products(self, head_dim: int, tensors: dict[str, Any]) -> Launch:
        given = {
            **tensors, "heads": self._heads, "group": self._heads // self._kv_heads, "regions": self._regions,
            "HEAD_DIM": head_dim, "ROWS": ROWS, "BLOCK_REGIONS": max(16, _power(self._regions)), "CHANNELS": CHANNELS,
        }  # fmt: skip
        return Launch(head_products, (-(-self._regions // ROWS), self._heads, self._batch), given, WARPS)

    def _write(self, own: Side, tensors: dict[str, Any], choose: bool) -> Launch:
        given = {
            **tensors, **self._lists(own),
            "heads": self._heads,
            "CHOOSE": choose, "HEADS": _power(self._heads), "BLOCK_REGIONS": _power(self._regions),
            "PER": _power(own.per), "ROWS": _power(own.rows), "COPY": STEP,
        }  # fmt: skip
        return Launch(choose_regions, (self._regions, self._batch), given, WARPS)

    def _turn(self, own: Side, tensors: dict[str, Any]) -> Launch:
        given = {
            **tensors, **self._lists(own),
            "fixed_bounds": own.base.bounds, "regions_of": own.regions_of,
            "queries": own.queries, "dense_rows": own.base.dense_rows, "all_rows": own.base.row_tiles,
            "WHOLE": own.whole, "ENTRIES": STEP, "QUERIES": STEP, "ROWS": _power(own.rows), "COPY": STEP,
        }  # fmt: skip
        return Launch(turn_lists, (self._regions, self._batch), given, WARPS)

    def _lists(self, own: Side) -> dict[str, Any]:
        """What both kernels that write lists take."""
        return {
            "row_tiles": own.row_tiles, "first": own.first, "masks": own.masks,
            "fixed": own.base.bases, "fixed_masks": own.base.mask_ids,
            "regions": self._regions, "chosen": self._chosen, "skip": own.skip, "per": own.per, "rows": own.rows,
            "length": own.length,
        }  # fmt: skip


def _power(number: int) -> int:
    """The smallest power of two of at least a number."""
    return 1 << (number - 1).bit_length()
