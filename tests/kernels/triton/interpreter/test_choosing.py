"""The kernels of dynamic patterns: the lists that they write, and what they choose, against torch's operators."""

import pytest
import torch

from visattn import Layout, parse
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.choosing.listed import listed_program
from visattn.kernels.triton.choosing.tables import tables
from visattn.kernels.triton.config import Config
from visattn.patterns import Routes

LISTS = {
    "whole blocks": ("topk(keep=3,block=4x4)", Layout((12, 16)), 16, 16),
    "several tiles in a block": ("topk(keep=2,block=4x8)", Layout((12, 16), 3), 16, 16),
    "short blocks, text": ("topk(keep=3,block=4x4)", Layout((10, 13), 5, 20), 16, 16),
    "short blocks of several tiles": ("topk(keep=2,block=8x8)", Layout((13, 18), 2), 32, 32),
    "tiles with empty slots": ("topk(keep=2,block=3x5)", Layout((9, 10)), 16, 16),
    "runs": ("topk(keep=2,block=32,key_block=64)", Layout(200, 1), 16, 32),
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


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("counted", [False, True])
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
