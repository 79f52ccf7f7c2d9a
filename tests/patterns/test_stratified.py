"""Tokens that stand for all: one of each stretch of the sequence, wherever grids put their axes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import qkv
from visattn import Layout, attention
from visattn.kernels.heads import best_patterns
from visattn.patterns import parse
from visattn.patterns.choice.clusters import first_centres
from visattn.patterns.choice.stratified import sampled_rows, stratified
from visattn.problem import Call


@given(st.integers(1, 300), st.integers(1, 5000))
def test_one_token_of_each_stretch(number, tokens):
    found = stratified(number, torch.tensor([tokens]))
    if tokens < number:
        assert found.tolist() == [min(i, tokens - 1) for i in range(number)]
        return
    bounds = torch.arange(number + 1) * tokens // number
    assert (bounds[:-1] <= found).all() and (found < bounds[1:]).all()


def test_lengths_of_a_batch_are_taken_each_for_itself():
    lengths = torch.tensor([[7], [0], [64], [1000]])
    found = stratified(10, lengths)
    assert found.shape == (4, 10) and found[1].tolist() == [0] * 10
    for length, own in zip(lengths, found, strict=True):
        assert torch.equal(stratified(10, length), own)


@pytest.mark.parametrize("grid", [(16, 16, 16), (64, 64), (21, 45, 80), (8, 30, 32), (4096,), (2, 2048)])
def test_no_axis_of_a_grid_is_looked_at_in_few_places(grid):
    rows = sampled_rows(Layout(grid, 5, 2), 64, torch.device("cpu")) - 5
    for axis, n in enumerate(grid):
        after = int(torch.tensor(grid[axis + 1 :]).prod())
        place = rows // after % n
        # Eight equal parts of an axis have a share of the rows each that is near an eighth; two halves even nearer.
        parts = min(n, 8)
        share = torch.bincount(place * parts // n, minlength=parts) / 64
        assert (share > 0.3 / parts).all() and (share < 2.2 / parts).all(), (axis, share)


def test_the_best_pattern_is_the_best_of_the_whole_grid():
    """A head that looks along columns but for the ones at the border, where it looks along rows."""
    layout, dim = Layout((16, 16)), 16
    row, column = torch.arange(16).repeat_interleave(16), torch.arange(16).repeat(16)
    wanted = torch.where((column == 0) | (column == 8), row, 16 + column)
    keys = torch.eye(32)[row] + torch.eye(32)[16 + column]
    q, k = 40 * torch.eye(32)[wanted][None, :, None], keys[None, :, None]
    v = qkv(layout, 1, dim=dim)[2]
    v = torch.nn.functional.pad(v, (0, 32 - dim)).to(q.dtype)
    texts = ["na(window=1x-1)", "na(window=-1x1)"]
    dense = attention(q, k, v, "dense", layout)
    errors = [(attention(q, k, v, text, layout) - dense).square().mean() for text in texts]
    best = parse(f"best(of=[{texts[0]}, {texts[1]}], rows=16)")
    assert errors[1] < errors[0]
    assert best_patterns(q, k, v, Call(best, layout, None, None)).tolist() == [[1]]


def test_centres_start_from_all_places():
    x = torch.arange(4096.0).view(1, 1, 4096, 1)
    found = first_centres(x, 64).flatten().long()
    assert len(set((found % 16).tolist())) == 16 and len(set((found // 16 % 16).tolist())) == 16
    valid = torch.ones(1, 4096, dtype=torch.bool)
    assert torch.equal(first_centres(x, 64, valid), first_centres(x, 64))
    # What is not valid moves no start.
    valid[:, 1000:1100] = False
    left = x[:, :, valid[0]]
    assert torch.equal(first_centres(x, 64, valid), first_centres(left, 64))
