"""What the Triton kernels read of a plan: lists, masks and box offsets, against the plan itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import layouts
from visattn import Layout, parse
from visattn.kernels.triton.boxes import PARTIAL, best_boxes, tiled
from visattn.kernels.triton.lists.positions import partners, positions
from visattn.kernels.triton.lists.program import box_offsets, pack, program
from visattn.patterns import dense_mask
from visattn.plans import plan

CPU = torch.device("cpu")


def visited(run, layout, columns):
    """The (row, column) pairs of tokens that a kernel computes, counted: [row tokens, column tokens]."""
    tokens, bounds, bases, ids = (t.numpy() for t in (run.tokens, run.bounds, run.bases, run.mask_ids))
    words = run.masks.numpy().view("<u4")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(bool)
    count = np.zeros((tokens.max() + 1, columns), np.int64)
    starts = {"prefix": 0, "suffix": layout.prefix + layout.tokens}
    runs = [(starts["prefix"], layout.prefix), (starts["suffix"], layout.suffix), (layout.length, run.extra)]
    steps = [
        (first + i, min(first + i + run.columns, first + n)) for first, n in runs for i in range(0, n, run.columns)
    ]
    for row, (start, split, stop, dense) in zip(tokens, bounds, strict=True):
        rows = row[row >= 0]
        assert (split - start) % run.tiles == (stop - split) % run.tiles == 0
        for i in range(start, stop):
            column = bases[i] + run.offsets.numpy()
            seen = np.ones((len(row), len(column)), bool) if i < split else bits[ids[i]][:, : len(column)]
            slots = np.flatnonzero(seen[row >= 0].any(0))
            assert (column[slots] < columns).all()
            count[np.ix_(rows, column[slots])] += seen[row >= 0][:, slots]
        for first, end in steps[:dense]:
            count[rows[:, None], np.arange(first, end)] += 1
    return count


@pytest.mark.parametrize(
    ("text", "layout", "ragged"),
    [
        ("na(window=5x5)", Layout((16, 16)), False),
        ("na(window=5x5)", Layout((16, 16), prefix=64), False),
        ("na(window=5x5)", Layout((16, 16), prefix=128, suffix=64), False),
        ("na(window=5x5)", Layout((16, 16), prefix=65), True),
        ("na(window=5x5)", Layout((16, 16), prefix=64, suffix=7), True),
        # Pooled keys are a run too: 16 of 4x4 blocks.
        ("clear(radius=3,pool=4)", Layout((16, 16), prefix=64), True),
        ("clear(radius=3,pool=2)", Layout((16, 16), prefix=64), False),
    ],
)
def test_runs_of_dense_tokens_that_end_inside_a_step(text, layout, ragged):
    run = program(plan(text, layout, (8, 8)), False, 1, CPU)
    assert run.columns == 64 and run.ragged == ragged
    steps = [-(-n // 64) for n in (layout.prefix, layout.suffix, run.extra)]
    assert run.has_dense == any(steps)


@given(
    layouts(),
    st.sampled_from(
        ["na(window=3)", "na(window=4,stride=2)", "clear(radius=3,pool=2)", "halo(block=3,halo=1)", "dense"]
    ),
    st.booleans(),
    st.sampled_from([(16, 16, 1), (32, 16, 1), (16, 32, 2), (32, 64, 2), (16, 8, 2), (32, 8, 8), (32, 16, 4)]),
)
def test_visits_are_the_pattern(layout, pattern, by_keys, sizes):
    rows, tile, per_step = sizes
    parsed = parse(pattern)
    tiles = tiled(parsed, layout, *((tile, rows) if by_keys else (rows, tile)))
    run = program(tiles, by_keys, per_step, CPU)
    extra = plan(parsed, layout).keys.extra
    truth = dense_mask(parsed, layout).numpy()
    if truth.shape[1] == layout.length and extra:
        grid = np.zeros((layout.length, extra), bool)
        grid[layout.prefix : layout.prefix + layout.tokens] = True
        truth = np.concatenate([truth, grid], 1)
    if by_keys:
        truth = truth.T
    assert np.array_equal(visited(run, tiles.queries.layout, truth.shape[1]), truth.astype(np.int64))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(0, 9))
def test_packed_bits(number, rows, columns, seed):
    masks = np.random.default_rng(seed).random((number, rows, columns)) < 0.5
    words = pack(masks, 8, columns)
    assert words.dtype == np.int32 and words.shape == (number, 8, -(-columns // 32))
    for m, r, c in np.ndindex(masks.shape):
        assert (int(words[m, r, c // 32]) >> (c % 32)) & 1 == masks[m, r, c]
    assert not words[:, rows:].any()


def test_longest_lists_start_first():
    tiles = plan("clear(radius=9)", Layout((40, 40), prefix=20), ((8, 8), (8, 8)))
    run = program(tiles, False, 1, CPU)
    bounds = run.bounds.numpy()
    visits = (bounds[:, 2] - bounds[:, 0])[run.dense_rows :]
    assert (np.diff(visits) <= 0).all()
    assert run.dense_rows == 1 and run.tokens[0, :20].tolist() == list(range(20))


def test_best_boxes_follow_the_pattern():
    """Windows and strides that boxes divide need no mask at all: the case of sliding tiles."""
    pattern, grid = parse("na(window=18x24x24,stride=16x8x8)"), (30, 48, 80)
    query, key = best_boxes(pattern.spans(grid), 128, 64)
    tiles = plan(pattern, Layout(grid), (query, key))
    assert tiles.full_share == 1 and tiles.tile_bound == pytest.approx(tiles.flop_bound)


@given(st.integers(3, 40), st.integers(2, 12), st.sampled_from([16, 32]))
def test_best_boxes_are_the_best(length, window, slots):
    pattern, layout = parse(f"na(window={min(window, length)})"), Layout((length, 7))

    def work(boxes):
        tiles = plan(pattern, layout, boxes)
        return (tiles.full_share + PARTIAL * (1 - tiles.full_share)) * tiles.entries

    best = work(best_boxes(pattern.spans(layout.grid), slots, slots))
    for side in (1, 2, 4, 8):
        if side <= 2 ** (length - 1).bit_length() and slots // side <= 8:
            assert best <= work(((side, slots // side),) * 2) + 1e-6


def test_boxes_never_exceed_the_kernel():
    for text in ("radial(decay=0.3)", "routing(regions=4x4,topk=2)", "halo(block=9x9,halo=2)", "dense"):
        for slots in (16, 32, 64, 128):
            layout = Layout((8, 20, 30) if "radial" in text else (40, 44))
            tiles = tiled(parse(text), layout, slots, slots)
            assert tiles.queries.capacity <= slots and tiles.keys.capacity <= slots


def test_positions_index_the_bias():
    pattern, layout = parse("na(window=3x5,dilation=2x1)"), Layout((7, 9), prefix=2)
    place, partner = positions(pattern, layout, CPU), partners(pattern, layout, CPU)
    truth = dense_mask(pattern, layout).numpy()[2:, 2:]
    sides = pattern.rpb_shape(layout.grid)
    assert place.entries == sides[0] * sides[1]
    count = np.zeros_like(truth, int)
    for entry, key in zip(*np.nonzero(partner.numpy() >= 0), strict=True):
        query = key  # the column of `partner` is the grid query
        token = int(partner[entry, query])
        count[query, token - 2] += 1
        delta = int(place.tokens[token]) - int(place.tokens[query + 2]) + place.centre
        assert delta == entry
    assert np.array_equal(count, truth.astype(int))


def test_box_offsets_of_a_dilated_box():
    tiles = plan("na(window=3x3,dilation=2x3)", Layout((8, 9)), ((2, 2), (2, 2)))
    assert box_offsets(tiles.keys)[:4].tolist() == [0, 3, 18, 21]
    assert len(box_offsets(tiles.keys)) == 16


def for_half(run, half):
    """The entries that a half of the rows multiplies by in each list, and whether under their mask; checks its steps.

    No half leaves out two steps in a row, nor the first one.
    """
    found = []
    for (start, split, stop, _), (second, alone, ends, _) in zip(run.bounds.numpy(), run.halves.numpy(), strict=True):
        steps = np.arange(start, stop, run.tiles)
        left = (steps >= alone) & (steps < ends) & ((steps - alone) // run.tiles % 2 != half)
        assert not left[:1].any() and not (left[1:] & left[:-1]).any() and (ends - alone) % (2 * run.tiles) == 0
        masked = (steps >= second) if half == 0 else (steps >= split) & (steps < ends)
        found.append([(i + t, m) for i, m in zip(steps[~left], masked[~left], strict=True) for t in range(run.tiles)])
    return found


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(
    ("pattern", "layout", "sizes", "saved"),
    [
        ("na(window=8x8,stride=4x4)", Layout((32, 24), 5), (32, 16, 1), 0.14),
        ("na(window=8x8,stride=4x4)", Layout((32, 24), 5), (32, 16, 2), 0.1),
        ("na(window=8x8,stride=4x4)", Layout((32, 24), 5), (32, 32, 1), 0.12),
        ("na(window=3x9x9)", Layout((6, 17, 20), 0, 7), (128, 32, 2), 0.09),
        ("clear(radius=5)", Layout((31, 40)), (64, 32, 1), 0.2),
    ],
)
def test_halves_visit_the_pattern(pattern, layout, sizes, saved, by_keys):
    rows, tile, per_step = sizes
    parsed = parse(pattern)
    slots = (tile, rows) if by_keys else (rows, tile)
    run = program(tiled(parsed, layout, *slots, "key" if by_keys else "query"), by_keys, per_step, CPU, by_halves=True)
    words = run.masks.numpy().view("<u4")
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(bool)
    truth = dense_mask(parsed, layout).numpy()
    truth = truth.T if by_keys else truth
    count, visits = np.zeros(truth.shape, np.int64), 0
    for half in (0, 1):
        own = slice(half * run.rows // 2, (half + 1) * run.rows // 2)
        for row, listed in zip(run.tokens.numpy()[:, own], for_half(run, half), strict=True):
            visits += len(listed)
            for i, masked in listed:
                column = run.bases.numpy()[i] + run.offsets.numpy()
                seen = bits[run.mask_ids.numpy()[i], own, : len(column)] if masked else np.ones((len(row), len(column)))
                some = np.flatnonzero(seen[row >= 0].any(0))
                count[np.ix_(row[row >= 0], column[some])] += seen[row >= 0][:, some].astype(int)
    listed = slice(layout.prefix, layout.prefix + layout.tokens)
    assert np.array_equal(count[listed, listed], truth[listed, listed])
    plain = program(tiled(parsed, layout, *slots), by_keys, per_step, CPU)
    assert plain.halves is None and visits <= (1 - saved) * 2 * len(plain.bases)
