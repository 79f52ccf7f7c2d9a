"""Attention in the order of the content: the tokens of each head sorted by their groups, as lists of tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch

from visattn.dispatch import Backend, choose, overhead
from visattn.kernels.choosing import on_every_token
from visattn.kernels.masks import ordered_rest
from visattn.layout import Layout
from visattn.operands import repeated
from visattn.patterns import OrderedPattern, Routes
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.listening import choosing, hears, tell_shares
from visattn.patterns.ordered import Carried, Clustered, carrying
from visattn.patterns.routes import lists_of
from visattn.prepare import run_call
from visattn.problem import Call, OtherKind, Problem, Support

# Channels behind those of a head, where sampled keys carry a weight: it in two parts, and what hides them from text.
CHANNELS, HIDDEN = 8, -1e4
# Pairs of dense attention that making groups costs a CPU for each token and head, where that is a hash or a mean.
TOKEN = 200.0
# And what holding a token against a group costs, once.
GROUP = 3.0


class Ordered(Backend):
    """Runs patterns of groups of tokens, by whoever runs lists of tiles."""

    name: ClassVar[str] = "ordered"

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Patterns in the order of the content."""
        if not isinstance(problem.pattern, OrderedPattern):
            return OtherKind(False, f"it runs patterns of groups of tokens, not {problem.pattern.name}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """That of the lists, of making groups, and of moving every token twice."""
        pattern = problem.pattern
        assert isinstance(pattern, OrderedPattern)
        own = _carried_problem(problem, pattern)
        each = TOKEN + GROUP * pattern.passes() * sum(pattern.groups(problem.layout))
        wider = own.head_dim / problem.head_dim
        return wider * choose(own).cost(own) + on_every_token(problem, each) + overhead(problem, 3.0, 1000)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern = call.pattern
        assert isinstance(pattern, OrderedPattern)
        with choosing():
            found = pattern.cluster(q, k, call.layout, call.key_mask, call.scale)
        _tell(found)
        return ordered_attention(q, k, v, call, found)


class Order(NamedTuple):
    """Where the grid tokens of each head go: every group begins a tile.

    Attributes:
        place: Slot of each token: int64 [BH, tokens].
        token: Token of each slot, some token where it is empty: int64 [BH, slots].
        filled: Which slots are not empty: bool [BH, slots].
        group: Group of each tile, the number of groups where it is empty: int64 [BH, tiles].
    """

    place: torch.Tensor
    token: torch.Tensor
    filled: torch.Tensor
    group: torch.Tensor


def order(ids: torch.Tensor, groups: int, tile: int, slots: int) -> Order:
    """The order of grid tokens by their groups.

    Args:
        ids: Group of each token: int64 [BH, tokens].
        groups: Number of groups.
        tile: Tokens of a tile.
        slots: Of the sequence that comes out, enough for every group to begin a tile.
    """
    rows, tokens = ids.shape
    sorted_ids, by_group = ids.sort(dim=1, stable=True)
    sizes = torch.zeros(rows, groups, dtype=torch.int64, device=ids.device)
    sizes = sizes.scatter_add(1, ids, torch.ones_like(ids))
    ends = ((sizes + tile - 1) // tile).cumsum(1)
    first_tile = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    first_token = torch.nn.functional.pad(sizes.cumsum(1)[:, :-1], (1, 0))
    number = torch.arange(tokens, device=ids.device)
    slot = (first_tile * tile - first_token).gather(1, sorted_ids) + number
    place = torch.zeros_like(ids).scatter(1, by_group, slot)
    token = torch.zeros(rows, slots, dtype=torch.int64, device=ids.device).scatter(1, slot, by_group)
    filled = torch.zeros(rows, slots, dtype=torch.bool, device=ids.device).scatter(1, slot, torch.ones_like(slot) > 0)
    tiles = torch.arange(slots // tile, device=ids.device).expand(rows, -1).contiguous()
    return Order(place, token, filled, torch.searchsorted(ends, tiles, right=True))


def slots_of(pattern: OrderedPattern, layout: Layout) -> int:
    """Slots in which every group of queries and of keys can begin a tile."""
    pairs = zip(pattern.tiles(layout), pattern.groups(layout), strict=True)
    most = max(tile * (layout.tokens // tile + min(groups, layout.tokens)) for tile, groups in pairs)
    both = math.lcm(*pattern.tiles(layout))
    return -(-most // both) * both


def ordered_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, found: Clustered
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of all tokens of the listed groups; arguments and results as in `Backend.run`."""
    pattern, layout, (batch, _, heads, dim) = call.pattern, call.layout, q.shape
    assert isinstance(pattern, OrderedPattern)
    tiles, slots = pattern.tiles(layout), slots_of(pattern, layout)
    sides = zip((found.queries, found.keys), pattern.groups(layout), tiles, strict=True)
    queries, keys = (order(ids.flatten(0, 1), groups, tile, slots) for ids, groups, tile in sides)
    routes = _routes(queries.group, keys.group, found.listed.flatten(0, 1))
    flat = [_of_heads(t, heads) for t in (q, k, v)]
    extra = None if found.extra is None else found.extra.flatten(0, 1)
    dense = layout.prefix + layout.suffix
    made = [_sorted(t, layout, o.token, extra) for t, o in zip(flat, (queries, keys, keys), strict=True)]
    scale = call.scale
    if found.weight is not None:
        if not scale:
            # Weights are added to logits, which a factor of 0 would take with it.
            made[0], scale = 0 * made[0], 1.0
        made = _weighted(made, found.weight.flatten(0, 1), dense, scale)
    mask = _key_mask(call, heads, keys, extra, found.weight)
    own = Carried(tiles[0], tiles[1], slots // tiles[1], pattern.expected(layout))
    sequence = Layout((slots,), dense, 0 if extra is None else extra.shape[1])
    given = replace(call, pattern=own, layout=sequence, scale=scale, key_mask=mask, parameters={})
    with carrying(own, routes):
        out, lse = run_call(made[0], made[1], made[2], given)
    place = queries.place if found.copied is None else queries.place.gather(1, found.copied.flatten(0, 1))
    back = _places(place, layout)
    out = out[:, :, 0, :dim].gather(1, back[..., None].expand(-1, -1, dim))
    out = out.unflatten(0, (batch, heads)).transpose(1, 2)
    if lse is None:
        return out, None
    return out, lse[:, :, 0].gather(1, back).unflatten(0, (batch, heads)).transpose(1, 2)


def ordered_rows(q: torch.Tensor, k: torch.Tensor, call: Call, index: torch.Tensor) -> torch.Tensor:
    """The weights with which chosen queries read all tokens: [B, H, R, S].

    Those of sampled keys are their tokens', and a query that has the output of another one has its weights.

    Args:
        q: Queries [B, S, H, D], float32 at least.
        k: Keys [B, S, Hkv, D].
        call: The call.
        index: Tokens [R].
    """
    pattern, layout, heads = call.pattern, call.layout, q.shape[2]
    assert isinstance(pattern, OrderedPattern)
    found = pattern.cluster(q, k, layout, call.key_mask, call.scale)
    rest = ordered_rest(call, q, k, k, found)
    seen, queries = rest.seen[:, :, index], q[:, index]
    if rest.copied is not None:
        own = rest.copied[:, :, index].transpose(1, 2)[..., None]
        queries = q.gather(1, own.expand(-1, -1, -1, q.shape[3]))
    bias = rest.bias.expand(-1, heads, -1, -1)
    logits = torch.einsum("brhd,bshd->bhrs", queries, rest.k) * call.scale + bias.to(q.dtype)
    empty = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen, float("-inf")).masked_fill(empty, 0)
    weights = logits.softmax(-1).masked_fill(empty, 0)
    if found.extra is None:
        return weights
    place = (found.extra + layout.prefix)[:, :, None].expand(-1, -1, len(index), -1)
    return weights[..., : layout.length].scatter_add(3, place, weights[..., layout.length :])


def _routes(rows: torch.Tensor, columns: torch.Tensor, listed: torch.Tensor) -> Routes:
    """Tiles of keys that each tile of queries lists, from the groups of both and which groups see each other."""
    # One row and one column more, for tiles that are empty.
    listed = torch.nn.functional.pad(listed, (0, 1, 0, 1))
    own = listed.gather(1, rows[..., None].expand(-1, -1, listed.shape[2]))
    mask = own.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))
    return lists_of(mask[:, None], columns.shape[1])


def _of_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, S, H or Hkv, D] as [BH, S, D]."""
    return repeated(x.transpose(1, 2), heads, 1).flatten(0, 1)


def _sorted(x: torch.Tensor, layout: Layout, token: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """Dense tokens, then grid tokens slot by slot, then the extra ones: [BH, S, D] -> [BH, ., 1, D]."""
    at = inner(layout)
    index = token if extra is None else torch.cat([token, extra], 1)
    grid = x[:, at].gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, : at.start], x[:, at.stop :], grid], 1)[:, :, None]


def _places(place: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where each token of the layout is in what `_sorted` gave: [BH, S]."""
    dense = torch.arange(layout.prefix + layout.suffix, device=place.device).expand(len(place), -1)
    return torch.cat([dense[:, : layout.prefix], place + dense.shape[1], dense[:, layout.prefix :]], 1)


def _key_mask(
    call: Call, heads: int, keys: Order, extra: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """Which keys of the sorted sequence there are: bool [BH, .]."""
    filled, layout = keys.filled, call.layout
    shown = torch.ones(len(filled), layout.prefix + layout.suffix, dtype=torch.bool, device=filled.device)
    if call.key_mask is not None:
        valid = call.key_mask.repeat_interleave(heads, 0)
        at = inner(layout)
        filled = filled & valid[:, at].gather(1, keys.token)
        shown = torch.cat([valid[:, : at.start], valid[:, at.stop :]], 1)
    parts = [shown, filled]
    if extra is not None and weight is not None:
        parts.append(weight.flatten(0, 1).isfinite())
    return torch.cat(parts, 1)


def _weighted(made: list[torch.Tensor], weight: torch.Tensor, dense: int, scale: float) -> list[torch.Tensor]:
    """Queries, keys and values with further channels that add the weights of the last keys to the scores."""
    q, k, v = made
    number, weight = weight.shape[1], weight.nan_to_num(neginf=0.0) / scale
    whole = weight.to(q.dtype)
    more_q, more_k = (torch.zeros(*t.shape[:3], CHANNELS, dtype=t.dtype, device=t.device) for t in (q, k))
    more_q[:, dense:, 0, :2] = 1
    # Dense queries see every token once: sampled keys are hidden from them. Each side has the root of what hides, which
    # as a whole is no number in half precision.
    root = math.sqrt(-HIDDEN / abs(scale))
    more_q[:, :dense, 0, 2] = root
    more_k[:, -number:, 0, 0] = whole
    more_k[:, -number:, 0, 1] = (weight - whole.to(weight.dtype)).to(q.dtype)
    more_k[:, -number:, 0, 2] = -math.copysign(root, scale)
    return [torch.cat([q, more_q], 3), torch.cat([k, more_k], 3), torch.nn.functional.pad(v, (0, CHANNELS))]


def _carried_problem(problem: Problem, pattern: OrderedPattern) -> Problem:
    """The call of lists that a call becomes, as far as its shapes tell."""
    layout, slots = problem.layout, slots_of(pattern, problem.layout)
    tiles = pattern.tiles(layout)
    own = Carried(tiles[0], tiles[1], slots // tiles[1], pattern.expected(layout))
    batch = max(1, problem.batch) * problem.heads
    # Keys that everybody sees are dense tokens of the sequence, on all sides.
    more = pattern.more_keys(layout)
    sequence = Layout((slots,), layout.prefix + layout.suffix, more)
    dim = problem.head_dim + CHANNELS * bool(more)
    return replace(problem, pattern=own, layout=sequence, batch=batch, heads=1, kv_heads=1, head_dim=dim, key_mask=True)


def _tell(found: Clustered) -> None:
    """Tell who listens how many pairs of grid tokens are seen."""
    if not hears():
        return
    sizes = []
    for ids, number in ((found.queries, found.listed.shape[2]), (found.keys, found.listed.shape[3])):
        zeros = torch.zeros(*ids.shape[:2], number, dtype=torch.float64, device=ids.device)
        sizes.append(zeros.scatter_add(2, ids, torch.ones_like(ids, dtype=torch.float64)))
    seen = torch.einsum("bhi,bhij,bhj->bh", sizes[0], found.listed.double(), sizes[1])
    tell_shares(seen / found.queries.shape[2] ** 2)


backend = Ordered()
