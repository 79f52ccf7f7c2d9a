"""Combiner by a preset: full attention whose probability of a token is a region's times the token's within it."""

import math

import pytest
import torch

import visattn
from tests.support.cases import qkv
from visattn import Layout, attention, parse


def combined(q, k, v, layout, block, scale):
    """Of each grid query: tokens of its own region and dense ones directly, those of each other by their region."""
    out, length = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), layout.length
    grid = range(layout.prefix, layout.prefix + layout.tokens)
    regions = [list(grid)[i : i + block] for i in range(0, layout.tokens, block)]
    dense = [i for i in range(length) if i not in grid]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys, values = (t[b, :, h * t.shape[2] // q.shape[2]] for t in (k, v))
            for i in range(length):
                direct = next((own for own in regions if i in own), list(grid))
                others = [own for own in regions if i in grid and i not in own]
                logits = [scale * q[b, i, h] @ keys[j] for j in (*direct, *dense)]
                # p(j) = p(region) p(j within it), with the mean key of a region for each of its tokens.
                regional = [scale * q[b, i, h] @ keys[own].mean(0) + math.log(len(own)) for own in others]
                weights = torch.stack([*logits, *regional]).softmax(0)
                probability = torch.zeros(length, dtype=q.dtype)
                probability[[*direct, *dense]] = weights[: len(logits)]
                for own, weight in zip(others, weights[len(logits) :], strict=True):
                    probability[own] = weight / len(own)
                assert abs(probability.sum() - 1) < 1e-12
                out[b, i, h] = probability @ values
    return out


@pytest.mark.parametrize("layout", [Layout((11, 9)), Layout((140,), 2, 1)])
def test_it_is_a_list_and_pooled_keys(layout):
    q, k, v = qkv(layout, 2, dim=8, batch=1)
    truth = combined(q, k, v, layout, 64, 0.3)
    assert (attention(q, k, v, "combiner", layout, scale=0.3) - truth).abs().max() < 1e-9
    rows = visattn.attention_rows(q, k, "combiner", layout, range(layout.length), scale=0.3)
    own = torch.einsum("bhrs,bshd->brhd", rows, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    assert (own - truth).abs().max() < 1e-9


def test_its_choice_looks_at_nothing():
    assert parse("combiner") == parse("topk(keep=1, always=self, rest=mean, block=64)")
    layout = Layout((256,))
    q, k, _ = qkv(layout, 1, dim=4)
    found = visattn.tile_choice(q, k, "combiner", layout)
    assert torch.equal(found[0, 0].bool(), torch.eye(4, dtype=torch.bool))
