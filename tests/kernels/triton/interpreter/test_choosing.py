"""The kernels of dynamic patterns: the lists that they write, and what they choose, against torch's operators."""

import math

import pytest
import torch

from visattn import Layout, attention, parse
from visattn.dispatch import load
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.backend import kernels_of
from visattn.kernels.triton.choosing.choose import chosen, part_tokens
from visattn.kernels.triton.choosing.listed import listed_program
from visattn.kernels.triton.choosing.tables import tables
from visattn.kernels.triton.config import Config
from visattn.kernels.triton.routes import MergedLists
from visattn.patterns import Routes
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.scores import block_means
from visattn.patterns.tailed import TailedPattern
from visattn.problem import Call, Problem

LISTS = {
    "whole blocks": ("topk(keep=3,block=4x4)", Layout((8, 12)), 16, 16),
    "several tiles in a block": ("topk(keep=2,block=4x8)", Layout((8, 16), 3), 16, 16),
    "short blocks, text": ("topk(keep=3,block=4x4)", Layout((6, 9), 5, 20), 16, 16),
    "short blocks of several tiles": ("topk(keep=2,block=8x8)", Layout((11, 9), 2), 32, 32),
    "tiles with empty slots": ("topk(keep=2,block=3x5)", Layout((6, 10)), 16, 16),
    "runs": ("topk(keep=2,block=32,key_block=64)", Layout(130, 1), 16, 32),
}


def lists_of_blocks(counted, owners, rows, columns, number):
    """Random lists without duplicates, and how many of each count."""
    made = torch.Generator().manual_seed(rows + columns)
    tiles = torch.rand(2, owners, rows, columns, generator=made).argsort(-1)[..., :number].sort(-1).values
    counts = torch.randint(0, number + 1, (2, owners, rows), generator=made) if counted else None
    return Routes(tiles, counts)


def entries(run, owner, row):
    """What a row lists: the tokens that it sees by entry, and whether entries come in whole steps, full ones first."""
    start, split, stop, _ = run.bounds[owner, row].tolist()
    seen, words = [], run.masks.shape[2]
    slots = run.columns // run.tiles
    for i in range(start, stop):
        base = int(run.bases[i])
        mask = run.masks[run.mask_ids[i]]
        bits = torch.stack([(mask >> j) & 1 for j in range(32)], -1).reshape(run.rows, words * 32)[:, :slots] != 0
        visible = torch.ones(slots, dtype=torch.bool) if i < split else bits[0]
        assert i < split or (bits == bits[0]).all()
        seen += (base + run.offsets[:slots][visible]).tolist()
    assert (split - start) % run.tiles == 0 and stop > start and (stop - start) % run.tiles == 0
    return seen


@pytest.mark.parametrize(("counted", "step"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", LISTS)
def test_lists_have_the_tokens_of_their_blocks(name, counted, step):
    text, layout, query_slots, key_slots = LISTS[name]
    pattern = parse(text)
    blocks = pattern.blocks(layout.grid)
    launch = Config(query_slots, key_slots * step, 4, 1, step)
    plan = plan_of(pattern, layout, "forward", launch)
    table = tables(plan, blocks, step, torch.device("cpu"))
    routes = lists_of_blocks(counted, 2, blocks.rows, blocks.columns, min(3, blocks.columns))
    run = listed_program(table, routes)
    assert run.groups == 2 and run.list_batch == 0
    spread = pattern.spread(routes, plan)
    listed = spread.listed()
    tokens = torch.from_numpy(plan.keys.tokens)
    for owner in range(4):
        sample, group = divmod(owner, 2)
        for tile in range(plan.queries.runs[1]):
            own = spread.tiles[sample, group, tile]
            own = own if listed is None else own[listed[sample, group, tile]]
            want = tokens[own].flatten()
            found = entries(run, owner, run.dense_rows + tile)
            assert sorted(found) == sorted(want[want >= 0].tolist())
        for row in range(run.dense_rows):
            assert torch.equal(run.bounds[owner, row], table.base.bounds[row])
    assert run.partial or (not counted and table.even)


def whole_numbers(shape, seed):
    """Whole numbers whose means and products are exact, so that many scores are equal."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=made).float()


def one_value_a_block(values, grid, block):
    """Each token has what the first one of its block has: means are exact under any mask."""
    first = torch.meshgrid(*(torch.arange(n) // b * b for n, b in zip(grid, block, strict=True)), indexing="ij")
    return values[:, torch.arange(math.prod(grid)).view(grid)[first].flatten()]


CHOICES = {
    "topk": ("topk(keep=0.3,block=4x4)", Layout((8, 12), 3, 2), "exact"),
    "topk, odd grid, mask": ("topk(keep=3,block=4x4)", Layout((7, 9), 5), "exact", "masked"),
    "topk, neighbours": (
        "topk(keep=5,block=2x4x4,always=self+near(1)+first(1))",
        Layout((3, 7, 5)),
    ),
    "topk, all": ("topk(keep=1.0,block=4x4)", Layout((5, 5)), "exact"),
    "topk, runs": ("topk(keep=0.4,block=16,key_block=8,always=none)", Layout(50, 1), "masked"),
    "topp": (
        "topp(p=0.6,block=4x4)",
        Layout((8, 12)),
    ),
    "topp, equal scores": ("topp(p=0.6,block=4x4)", Layout((8, 8)), "exact"),
    "topp, limits, mask": ("topp(p=0.8,block=4x4,most=0.5,least=2)", Layout((7, 9), 5), "masked"),
    "topp, forced padding": ("topp(p=0.99,block=3,always=self+first(3),most=5)", Layout(37), "masked"),
    "topp, whole share, mask": ("topp(p=1.0,block=4x4,most=0.4,always=none)", Layout((7, 9), 5), "masked"),
    "topp, under": (
        "topp(p=0.4,rule=under,block=4x4,always=none,least=0)",
        Layout((7, 9)),
    ),
    "above": (
        "above(tau=0.5,block=4x4)",
        Layout((8, 12)),
    ),
    "above, limit, mask": ("above(tau=-0.3,block=4x4,most=0.6)", Layout((7, 9), 0, 4), "masked"),
    "parts": ("topk(keep=0.3,block=4x4,score=parts(4x2))", Layout((7, 9)), "masked"),
    "topk, causal frames": ("topk(keep=0.3,block=1x4x4,causal=1x0x0)", Layout((4, 7, 5), 2), "exact", "masked"),
    "topp, causal line": ("topp(p=0.7,least=2,most=4,block=8,key_block=4,always=first(1),causal=true)", Layout(50)),
    "above, causal line": ("above(tau=0.2,block=8,score=parts(2x4),causal=true)", Layout(61, 1), "masked"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_chooses_what_torch_chooses(name):
    text, layout, *special = CHOICES[name]
    pattern = parse(text)
    blocks, at = pattern.blocks(layout.grid), inner(layout)
    if "exact" in special:
        q, k = (whole_numbers((2, layout.length, heads, 16), heads) for heads in (2, 1))
    else:
        q, k = (torch.randn(2, layout.length, heads, 24, generator=torch.manual_seed(heads)) for heads in (2, 1))
    valid = None
    if "masked" in special:
        valid = torch.rand(2, layout.length, generator=torch.manual_seed(3)) > 0.4
        # A sample that ends early, with blocks that have no token.
        valid[1, layout.length // 2 :] = False
        valid = valid[:, at]
    q, k = q[:, at], k[:, at]
    if "exact" in special and valid is not None:
        # A mean over three tokens is rounded, and equal scores are equal no more on some CPUs.
        q, k = (one_value_a_block(*each) for each in ((q, layout.grid, blocks.queries), (k, layout.grid, blocks.keys)))
    args = pattern, q, k, blocks, valid, 0.25
    found, want = chosen(*args), pattern.chosen_by_torch(*args[1:])
    assert found.tiles.dtype == torch.int32
    assert (found.counts is None) == (want.counts is None)
    if found.counts is not None:
        assert torch.equal(found.counts.long(), want.counts)
    assert torch.equal(found.mask(0, blocks.columns), want.mask(0, blocks.columns))
    if found.counts is not None:
        assert not found.tiles.masked_fill(found.listed(), 0).any(), "zeros lie behind what counts"


def test_scores_of_some_heads_at_a_time(monkeypatch):
    pattern, layout = parse("topk(keep=2,block=4x4)"), Layout((8, 8))
    q, k = (torch.randn(2, layout.length, heads, 24, generator=torch.manual_seed(heads)) for heads in (3, 1))
    args = pattern, q, k, pattern.blocks(layout.grid), None, 0.25
    want = chosen(*args)
    monkeypatch.setattr("visattn.kernels.triton.choosing.choose.SCORES", 2 * 2 * 4 * 4)
    assert torch.equal(chosen(*args).tiles, want.tiles)


@pytest.mark.parametrize(
    "more", ["per=head", "score=bounds", "score=parts(64x1)", "share=2", "alike=0.5", "causal=0x1,block=8x1"]
)
def test_leaves_other_rules_and_scores_to_torch(more):
    pattern, layout = parse(f"topk(keep=0.3,{more})"), Layout((16, 16))
    q = torch.randn(1, layout.length, 2, 16)
    assert chosen(pattern, q, q, pattern.blocks(layout.grid), None, 0.25) is None
    assert pattern.choose(q, q, layout).tiles.shape[0] == 1


def test_attention_along_lists_that_kernels_choose(monkeypatch):
    text, layout = "topp(p=0.5,block=4x4,key_block=2x4)", Layout((7, 8), 3)
    q = torch.randn(1, layout.length, 2, 16, generator=torch.manual_seed(0), requires_grad=True)
    k, v = (torch.randn(1, layout.length, 1, 16, generator=torch.manual_seed(i)) for i in (1, 2))
    truth = attention(q, k, v, text, layout, backend="reference")
    (want,) = torch.autograd.grad(truth.square().sum(), q)
    monkeypatch.setattr("visattn.patterns.dynamic.by_kernels", chosen)
    out = attention(q, k, v, text, layout, backend="triton")
    (found,) = torch.autograd.grad(out.square().sum(), q)
    assert (out - truth).abs().max() < 1e-5 and (found - want).abs().max() < 1e-4


RESTS = {
    "means of the rest": ("topk(keep=1,block=4x4,rest=mean)", Layout((8, 8)), {}),
    "text, odd grid, mask": ("topp(p=0.4,block=4x4,rest=mean)", Layout((5, 7), 3, 2), {"masked": True}),
    "blocks of several tiles, no list": (
        "above(tau=1.5,block=8x8,key_block=4x4,always=none,rest=mean)",
        Layout((8, 9)),
        {},
    ),
    "many blocks": ("topk(keep=3,block=16,key_block=2,always=none,rest=mean)", Layout(71), {}),
}


@pytest.mark.parametrize("name", RESTS)
def test_means_of_what_is_not_listed(name):
    text, layout, special = RESTS[name]
    q = torch.randn(2, layout.length, 2, 24, generator=torch.manual_seed(0))
    k, v = (torch.randn(2, layout.length, 1, 24, generator=torch.manual_seed(i)) for i in (1, 2))
    mask = None
    if special:
        mask = torch.rand(2, layout.length, generator=torch.manual_seed(3)) > 0.4
        # Blocks without a valid token have no mean.
        mask[1, layout.length // 2 :] = False
    found = results(q, k, v, text, layout, mask, "triton")
    truth = results(q, k, v, text, layout, mask, "reference")
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
        assert (one - other).abs().max() < 2e-5, name


@pytest.mark.parametrize("head_dim", [24, 80])
@pytest.mark.parametrize("name", RESTS)
def test_values_that_change_with_keys_where_nothing_is_listed(name, head_dim, monkeypatch):
    text, layout, special = RESTS[name]
    text = text.replace("rest=mean", "rest=slope")
    q = torch.randn(2, layout.length, 2, head_dim, generator=torch.manual_seed(0))
    k, v = (torch.randn(2, layout.length, 1, head_dim, generator=torch.manual_seed(i)) + i for i in (1, 2))
    mask = None
    if special:
        mask = torch.rand(2, layout.length, generator=torch.manual_seed(3)) > 0.4
        mask[1, layout.length // 2 :] = False
    options = {"key_mask": mask, "return_lse": True, "scale": -0.4}
    truth = attention(q, k, v, text, layout, backend="reference", **options)
    # Operators of torch have no part in it, in a first call and in one that is kept.
    monkeypatch.setattr(TailedPattern, "tail", None)
    for _ in range(2):
        found = attention(q, k, v, text, layout, backend="triton", **options)
        for one, other in zip(found, truth, strict=True):
            assert torch.equal(one.isinf(), other.isinf())
            assert (one - other).masked_fill(one.isinf(), 0).abs().max() < 1e-4


def test_what_changes_with_keys_has_gradients_by_torch():
    text, layout = "topk(keep=1,block=4x4,rest=slope)", Layout((8, 8))
    q, k, v = torch.randn(3, 1, 64, 2, 16, generator=torch.manual_seed(0))
    found, truth = (results(q, k, v, text, layout, None, backend) for backend in ("triton", "reference"))
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
        assert (one - other).abs().max() < 5e-5, name
    assert not load("triton").keeps_results(Problem.of(q, k, v, Call(parse(text), layout, 0.25)))


SHARED = {
    "tokens choose": ("topk(keep=2,block=1x1,key_block=4x4)", Layout((5, 7), 3, 2), True),
    "blocks of two, key blocks of several tiles": (
        "topp(p=0.3,of=height,block=1x2,key_block=8x8)",
        Layout((5, 9)),
        False,
    ),
}


@pytest.mark.parametrize(
    "name", [name if not i else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(SHARED)]
)
def test_blocks_that_share_a_tile_of_queries(name):
    text, layout, masked = SHARED[name]
    q = torch.randn(1, layout.length, 2, 16, generator=torch.manual_seed(0))
    k, v = (torch.randn(1, layout.length, 1, 16, generator=torch.manual_seed(i)) for i in (1, 2))
    # The last tokens are hidden, with all of some blocks.
    mask = torch.arange(layout.length)[None] % 3 * (torch.arange(layout.length) < 25) > 0 if masked else None
    kernels = kernels_of(q, k, v, Call(parse(text), layout, 0.25), lambda: None)
    assert isinstance(kernels.lists(q, k, v, mask, True), MergedLists)
    found = results(q, k, v, text, layout, mask, "triton")
    truth = results(q, k, v, text, layout, mask, "reference")
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
        assert torch.equal(one.isinf(), other.isinf())
        assert (one - other).masked_fill(one.isinf(), 0).abs().max() < 2e-5, name


def results(q, k, v, text, layout, mask, backend):
    """Output, log-sum-exp and gradients."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    options = {"key_mask": mask, "return_lse": True, "scale": -0.4}
    out, lse = attention(*leaves, text, layout, backend=backend, **options)
    weight = torch.randn(out.shape, generator=torch.manual_seed(9))
    loss = (out * weight).sum() + lse.masked_fill(lse.isinf(), 0).square().mean()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def test_second_derivatives_of_means_are_refused():
    q = torch.randn(1, 16, 1, 16, requires_grad=True)
    out = attention(q, q, q, "topk(keep=1,block=2x4,rest=mean)", Layout((4, 4)), backend="triton")
    with pytest.raises(NotImplementedError, match="backend='tiles'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_means_of_blocks():
    layout, box = Layout((5, 7)), (2, 4)
    x = torch.randn(2, layout.length, 3, 24, generator=torch.manual_seed(0)).to(torch.float16)
    valid = torch.rand(2, layout.length, generator=torch.manual_seed(1)) > 0.7
    for mask in (None, valid):
        found = load("triton").means(x, layout.grid, box, mask)
        assert (found - block_means(x, layout.grid, box, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [(3, 5), (2, 20), (8, 8), (1, 3)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_blocks_that_reach_behind_the_grid_hold_its_tokens_alone(grid, parts):
    box = (8, 8)
    own = part_tokens(grid, box, parts, torch.device("cpu"))
    place = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            inside = (row % 8 * 8 + column % 8) * parts // 64
            place.setdefault((column // 8) * parts + inside, []).append(row * grid[1] + column)
    assert [sorted(part[part >= 0].tolist()) for part in own] == [place.get(i, []) for i in range(len(own))]
    assert own.shape[1] <= min(8, grid[0]) * min(8, grid[1])
