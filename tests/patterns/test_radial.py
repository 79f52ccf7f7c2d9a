import time
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import tiles
from tests.support.oracles import visited
from tests.support.places import GOLDEN
from visattn import dense_mask, parse, plan
from visattn.layout import Layout
from visattn.patterns import Radial

BLOCKS = torch.load(GOLDEN / "radial_blocks.pt", weights_only=True)


def token_rule(i, j, n, decay, sink, block):
    """The n x n mask of frames i and j (the paper's window and split, as the released code has them)."""
    a = np.arange(n)
    far = abs(a[:, None] - a)
    if sink and j == 0:
        return far >= 0
    r = abs(i - j)
    share = Fraction(2 ** n.bit_length(), 2 ** r.bit_length())
    if share < 128 and r % int(128 / share):
        return far < 0
    return far <= (n if r <= 1 else max(decay * share, block))


def original_blocks(frames, n, decay, sink, block, spill=False):
    """The released code, frame pair by frame pair, as the notes on it say; it loses what spills over, or not."""
    total = frames * n
    blocks = np.zeros((ceil(total / block), ceil(total / block)), bool)
    lost = False
    for i in range(frames):
        for j in range(frames):
            oi, oj = i * n % block, j * n % block
            room = [(o + (ceil(n / block) + spill) * block) // block * block for o in (oi, oj)]
            padded = np.zeros((oi + n + block, oj + n + block), bool)
            padded[oi : oi + n, oj : oj + n] = token_rule(i, j, n, decay, sink, block)
            lost |= oi + n > room[0] or oj + n > room[1]
            padded = np.pad(padded, (0, block))[: room[0], : room[1]]
            for bi in range(room[0] // block):
                for bj in range(room[1] // block):
                    density = padded[bi * block : (bi + 1) * block, bj * block : (bj + 1) * block].sum(0) / block
                    if (density > 0).any() and (density > 1 / 3).sum() / (density > 0).sum() > 0.6:
                        blocks[i * n // block + bi, j * n // block + bj] = True
    tail = total // block
    blocks[tail:] = blocks[:, tail:] = True
    return blocks, lost


def whole_blocks(frames, n, decay, sink, block):
    """The same rule on the tokens of each block together, from the whole token mask."""
    rows = [np.concatenate([token_rule(i, j, n, decay, sink, block) for j in range(frames)], 1) for i in range(frames)]
    mask = np.concatenate(rows)
    size = ceil(len(mask) / block)
    blocks = np.zeros((size, size), bool)
    for bi in range(size):
        for bj in range(size):
            density = mask[bi * block : (bi + 1) * block, bj * block : (bj + 1) * block].sum(0) / block
            blocks[bi, bj] = (density > 1 / 3).sum() > 0.6 * (density > 0).sum()
    np.fill_diagonal(blocks, True)
    tail = len(mask) // block
    blocks[tail:] = blocks[:, tail:] = True
    return blocks


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: f"{c['frames']}x{c['tokens_per_frame']}+{c['text']}")
def test_equals_the_original(case):
    pattern = Radial(case["decay"], case["sink"], case["block"])
    block, text = case["block"], case["text"]
    layout = Layout((case["frames"], case["tokens_per_frame"]), suffix=text)
    mask = dense_mask(pattern, layout)
    expected = case["mask"].repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(mask, expected)
    made = plan(pattern, layout)
    assert made.full_share == 1.0 and made.entries == case["mask"].sum() and made.visible == mask.sum()
    same = original_blocks(case["frames"], case["tokens_per_frame"], case["decay"], case["sink"], block)[0]
    assert np.array_equal(pattern.blocks(layout.grid), same)


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(1, 9),
    n=st.integers(1, 24),
    decay=st.sampled_from([0.2, 0.5, 1.0, 3.0]),
    sink=st.booleans(),
    block=st.integers(1, 12),
)
def test_block_mask(frames, n, decay, sink, block):
    ours = Radial(decay, sink, block).blocks((frames, n))
    original, lost = original_blocks(frames, n, decay, sink, block)
    if 2 * n >= block:
        assert np.array_equal(ours, original_blocks(frames, n, decay, sink, block, spill=True)[0])
        assert (ours >= original).all() and (lost or np.array_equal(ours, original))
        assert lost == any(i * n % block + n > ceil(n / block) * block for i in range(frames))
    else:
        assert np.array_equal(ours, whole_blocks(frames, n, decay, sink, block))
    assert ours.diagonal().all(), "every token sees itself"


def test_loses_nothing_where_the_original_does():
    original, lost = original_blocks(6, 300, 0.95, False, 64)
    ours = Radial(0.95, False, 64).blocks((6, 300))
    assert lost and (ours >= original).all() and (ours & ~original).any()
    # Frames of a quarter block: the original keeps nothing at all.
    assert not original_blocks(8, 4, 1.0, False, 16)[0].any()
    assert Radial(1.0, False, 16).blocks((8, 4)).diagonal().all()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_plan(data):
    frames, height, width = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)))
    layout = Layout((frames, height, width), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5)))
    pattern = Radial(data.draw(st.sampled_from([0.2, 1.0])), data.draw(st.booleans()), data.draw(st.integers(1, 9)))
    truth = dense_mask(pattern, layout)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    block = torch.arange(layout.tokens) // pattern.block
    blocks = torch.tensor(pattern.blocks(layout.grid))
    assert torch.equal(truth[inner, inner], blocks[block][:, block])
    assert torch.equal(truth, dense_mask(pattern, Layout((frames, height * width), layout.prefix, layout.suffix)))
    made = plan(pattern, layout, data.draw(tiles(1)))
    assert torch.equal(visited(made), truth) and made.visible == truth.sum()
    assert pattern.covers(layout.grid) == bool(truth.all())
    assert str(parse(str(pattern))) == str(pattern)


@pytest.mark.parametrize("frames", [21, 33])
def test_long_videos_are_planned_in_seconds(frames):
    before = time.process_time()
    made = plan(Radial(0.2), Layout((frames, 45, 80), suffix=226))
    assert time.process_time() - before < 15
    assert made.visible < 0.6 * made.layout.length**2
    rows = np.bincount(made.lists.rows, minlength=made.queries.tiles)
    assert (rows > 0).all()


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("radial(decay=0)", (4, 9), r"decay=0 must be a number above 0"),
        ("radial(decay=true)", (4, 9), r"decay=True must be a number above 0"),
        ("radial(sink=3)", (4, 9), r"sink=3 must be true or false"),
        ("radial(block=0)", (4, 9), r"block=0 must be one whole number of at least 1"),
        (
            "radial(block=8x8)",
            (4, 9),
            r"block=\(8, 8\) must be one whole number of at least 1: blocks are cut from the flat sequence",
        ),
        (
            "radial",
            (36,),
            r"radial needs frames but grid \(36,\) has one axis: pass a grid \(frames, height, width\)",
        ),
    ],
)
def test_errors(text, grid, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout(grid))
