"""Kinds of patterns: what each one is, and that a static pattern of one's own needs three methods only."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv, tiles
from tests.support.oracles import dense_attention, mask_of, visited
from visattn import Layout, dense_mask, parse, plan
from visattn.patterns import (
    PATTERNS,
    ComposedPattern,
    ListedPattern,
    MergingPattern,
    RoutedPattern,
    StaticPattern,
)
from visattn.patterns.geometry import TilePairs

EXAMPLES = {
    StaticPattern: {"dense", "na(window=3)", "halo(block=2, halo=1)", "clear(radius=2, pool=2)", "radial", "groups(2)"},
    RoutedPattern: {"routing(regions=2, topk=1)", "topk(keep=0.5)", "topp(p=0.5)", "above(tau=0.5)", "verticalslash"},
    ComposedPattern: {"agent(agents=2)", "linear", "flow", "mala", "wersa", "sigmoid", "sparselinear(na(window=3))"}
    | {"clipped", "gated", "selective", "sla", "sla2", "vsa", "centroids", "pruned(by=topk(keep=0.5))"}
    | {
        "residual(of=na(window=3))",
        "broadcast",
        "gate(by=topk(keep=0.5))",
        "kmeans",
        "lsh",
        "best(of=[dense, na(window=3)])",
        "perhead(heads={0: dense})",
    },
    MergingPattern: {"agentsd"},
}


@dataclass(frozen=True)
class Cross(StaticPattern):
    """Queries see the tokens that share an index on some axis with them."""

    name: ClassVar[str] = "cross"

    def check(self, grid):
        """Any grid."""

    def grid_mask(self, grid):
        """Some index is shared."""
        where = np.indices(grid).reshape(len(grid), -1)
        return (where[:, :, None] == where[:, None]).any(0)

    def tile_pairs(self, grid, queries, keys):
        """By the mask itself: good enough for small grids."""
        tokens = [np.maximum(t.tokens[t.grid_tiles] - t.layout.prefix, -1) for t in (queries, keys)]
        rows, columns = tokens[0][:, None, :, None], tokens[1][None, :, None, :]
        mask = self.grid_mask(grid)[rows, columns] & (rows >= 0) & (columns >= 0)
        query, key = np.nonzero(mask.any((2, 3)))
        return TilePairs(query, key, np.arange(len(query)), mask[query, key], int(mask.sum()))


def test_every_pattern_is_of_one_kind():
    texts = [text for kind in EXAMPLES for text in EXAMPLES[kind]]
    assert {type(parse(text)) for text in texts} == set(PATTERNS)
    for kind, examples in EXAMPLES.items():
        for text in examples:
            assert [other for other in EXAMPLES if isinstance(parse(text), other)] == [kind], text
            assert isinstance(parse(text), ListedPattern) == (kind in (StaticPattern, RoutedPattern))


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_a_pattern_of_ones_own_runs_everywhere(data):
    layout = data.draw(layouts(sides=(12, 5, 3)))
    truth = mask_of(lambda q, k: any(i == j for i, j in zip(q, k, strict=True)), layout)
    assert torch.equal(dense_mask(Cross(), layout), truth)
    assert torch.equal(visited(plan(Cross(), layout, data.draw(tiles(layout.dims)))), truth)
    q, k, v = qkv(layout, 2, grad=True)
    expected = dense_attention(q, k, v, truth, q.shape[3] ** -0.5)
    truths = gradients(expected, (q, k, v))
    for backend in ("reference", "tiles", "sdpa"):
        out = visattn.attention(q, k, v, Cross(), layout, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        for ours, theirs in zip(gradients(out, (q, k, v)), truths, strict=True):
            assert (ours - theirs).abs().max() < 1e-9
    parts = [visattn.patterns.Sigmoid(Cross()), visattn.patterns.SparseLinear(Cross())]
    assert all(visattn.attention(q, k, v, pattern, layout).isfinite().all() for pattern in parts)


def test_a_composition_has_the_mask_of_its_inner_pattern():
    layout = Layout((5, 4), prefix=1)
    for inner in ("na(window=3)", "clear(radius=2, pool=2)"):
        for outer in ("sigmoid", "sparselinear"):
            assert torch.equal(dense_mask(f"{outer}(sparse={inner})", layout), dense_mask(inner, layout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear", r"linear\(feature=elu\) has no tile plan: it is a product with sums over all keys"),
        ("sigmoid", r"sigmoid\(sparse=dense\) has no tile plan: it is a composition around dense, which has"),
        ("agentsd", r"agentsd merges tokens of a UNet"),
    ],
)
def test_what_is_not_listed_has_no_plan(text, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout((8, 8)))
