"""Keys on other grids, rings, and values of another width: every engine against dense attention under the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from tests.support.cases import crossed, gradients
from tests.support.geometry import patterns, problems, truth
from tests.support.oracles import dense_attention
from visattn import attention
from visattn.dispatch import load, verdict
from visattn.kernels.flex import backend as flex
from visattn.kernels.flex.blocks import tile_plan
from visattn.kernels.flex.visible import visible
from visattn.patterns import Neighborhood
from visattn.problem import Call, Problem


@pytest.mark.parametrize("name", ["reference", "sdpa", "tiles"])
@settings(max_examples=20)
@given(problems())
def test_an_engine_is_dense_attention_under_the_mask(name, problem):
    pattern, layout, inputs, valid, seen = problem
    out = attention(*inputs, pattern, layout, key_mask=valid, backend=name)
    expected = dense_attention(*inputs, seen, inputs[0].shape[-1] ** -0.5)
    assert out.shape == expected.shape and (out - expected).abs().max() < 1e-10
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=8, deadline=None)
@given(problems())
def test_flex_and_its_gradients_are_dense_attention_under_the_mask(problem):
    """FlexAttention uncompiled, which has gradients on a CPU where nobody forbids them."""
    pattern, layout, inputs, valid, seen = problem
    scale = inputs[0].shape[-1] ** -0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "compiled", lambda signature: torch_flex.flex_attention)
        patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
        out, _ = flex.attend(*inputs, Call(pattern, layout, scale, valid))
        expected = dense_attention(*inputs, seen, scale)
        assert out.shape == expected.shape and (out - expected).abs().max() < 1e-9
        for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert (ours - theirs).abs().max() < 1e-8


@settings(max_examples=25)
@given(st.data(), crossed(sides=(14, 5, 3)))
def test_masks_of_flex_are_what_the_words_say(data, layout):
    """What its kernels read, forward and backward; compiled, they run the shared cases of these kinds."""
    pattern = data.draw(patterns(layout.dims))
    tiles = tile_plan(pattern, layout, 16)
    queries, keys = (torch.from_numpy(side.tokens.ravel()) for side in (tiles.queries, tiles.keys))
    seen = visible(pattern, tiles, torch.device("cpu"))(torch.arange(len(queries))[:, None], torch.arange(len(keys)))
    found = torch.zeros(layout.length, layout.keys.length, dtype=torch.bool)
    rows, columns = torch.nonzero(queries >= 0)[:, 0], torch.nonzero(keys >= 0)[:, 0]
    found[queries[rows][:, None], keys[columns]] = seen[rows][:, columns]
    expected = truth(pattern, layout)
    # A table speaks of tiles that are listed alone.
    listed = torch.zeros(tiles.queries.tiles, tiles.keys.tiles, dtype=torch.bool)
    listed[torch.from_numpy(tiles.lists.rows), torch.from_numpy(tiles.lists.tile)] = True
    pairs = listed.repeat_interleave(tiles.queries.capacity, 0).repeat_interleave(tiles.keys.capacity, 1)
    asked = torch.zeros_like(found)
    asked[queries[rows][:, None], keys[columns]] = pairs[rows][:, columns]
    assert torch.equal(found & asked, expected) and not (expected & ~asked).any()


@settings(max_examples=25)
@given(st.data(), crossed(sides=(14, 5, 3)))
def test_natten_refuses_rings_and_other_keys(data, layout):
    pattern = data.draw(patterns(layout.dims))
    ring = isinstance(pattern, Neighborhood) and any(axis.circular for axis in pattern.spans(*layout.grids))
    problem = Problem(pattern, layout, 1, 2, 2, 16, torch.float32, "cpu")
    support = verdict(load("natten"), problem)
    if layout.key_layout is not None:
        assert (not support.ok and "not installed" in support.reason) or "one layout" in support.reason
    elif ring:
        assert not support.ok and ("not installed" in support.reason or "wrap around" in support.reason)
