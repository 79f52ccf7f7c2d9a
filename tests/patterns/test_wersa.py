"""WERSA against Haar transforms step by step, and against dense matrices of weights in float64, with gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu

import visattn
from tests.patterns.test_linear import draw_parameters
from tests.support.cases import gradients, layouts, qkv
from visattn import Layout, attention, parse
from visattn.kernels.linear.wersa import weighed_bands
from visattn.patterns import Wersa
from visattn.problem import Support


def haar(x, shares, axes):
    """Tokens [*grid, D] with each Haar band times its share, by even and odd tokens; sides are powers of two."""
    if len(shares) == 1:
        return x * shares[0]
    parts = {(): x}
    for axis in axes:
        split = {}
        for key, part in parts.items():
            even, odd = (part.index_select(axis, torch.arange(start, part.shape[axis], 2)) for start in (0, 1))
            split[(*key, 0)], split[(*key, 1)] = (even + odd) / math.sqrt(2), (even - odd) / math.sqrt(2)
        parts = split
    low = (0,) * len(axes)
    parts = {key: haar(part, shares[1:], axes) if key == low else part * shares[0] for key, part in parts.items()}
    for axis in reversed(axes):
        joined = {}
        for key in {k[:-1] for k in parts}:
            low_part, high = parts[(*key, 0)], parts[(*key, 1)]
            both = (low_part + high) / math.sqrt(2), (low_part - high) / math.sqrt(2)
            joined[key] = torch.stack(both, axis + 1).flatten(axis, axis + 1)
        parts = joined
    return parts[()]


@pytest.mark.parametrize("grid", [(16,), (8, 16), (4, 8, 4)])
def test_bands_are_those_of_the_haar_transform(grid):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, math.prod(grid), 3, 5, generator=made, dtype=torch.float64)
    shares = torch.rand(2, 3, 3, generator=made, dtype=torch.float64)
    out = weighed_bands(x, shares, Layout(grid), None)
    for b, h in itertools.product(range(2), range(3)):
        truth = haar(x[b, :, h].view(*grid, 5), shares[b, h], tuple(range(len(grid))))
        assert (out[b, :, h].view(*grid, 5) - truth).abs().max() < 1e-12


def slow_bands(x, shares, layout, keep):
    """Tokens [S, D] of one head, one token at a time."""
    places = list(itertools.product(*map(range, layout.grid)))
    rows = []
    for i, row in enumerate(x):
        at = i - layout.prefix
        if not 0 <= at < len(places):
            rows.append(row * shares[-1])
            continue
        found, finer = torch.zeros_like(row), row
        for level in range(1, len(shares)):
            box = [c >> level for c in places[at]]
            inside = [j for j, p in enumerate(places) if [c >> level for c in p] == box and keep[layout.prefix + j]]
            coarser = x[[layout.prefix + j for j in inside]].mean(0) if inside else torch.zeros_like(row)
            found, finer = found + (finer - coarser) * shares[level - 1], coarser
        rows.append(found + finer * shares[-1])
    return torch.stack(rows)


def slow_weights(q, k, layout, own, keep):
    """One head: [S, S]."""
    inside = keep.clone()
    inside[: layout.prefix] = False
    inside[layout.prefix + layout.tokens :] = False
    mean = q[inside].mean(0) if inside.any() else torch.zeros_like(q[0])
    hidden = (mean @ own["hidden_weight"] + own["hidden_bias"]).relu()
    shares = (hidden @ own["gate_weight"] + own["gate_bias"]).sigmoid() * own["scale"]
    fq, fk = (
        (slow_bands(gelu(x), shares, layout, keep) @ own[name]).relu() for x, name in ((q, "query_map"), (k, "key_map"))
    )
    weights = fq @ fk.T * keep
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total > 0, torch.ones_like(total))


@settings(max_examples=8)
@given(data=st.data())
def test_equals_the_matrix_of_weights_with_gradients(data):
    layout, pattern = data.draw(layouts(sides=(9, 5, 3))), Wersa(data.draw(st.integers(1, 3)), 12)
    q, k, v = qkv(layout, 2, data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 7)), batch=2, grad=True)
    parameters = draw_parameters(pattern, 2, q.shape[3], layout.grid) if data.draw(st.booleans()) else {}
    keep = torch.ones(2, layout.length, dtype=torch.bool)
    key_mask = None
    if data.draw(st.booleans()):
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
        key_mask[1] = data.draw(st.booleans())
        keep = key_mask
    out = attention(q, k, v, pattern, layout, key_mask=key_mask, parameters=parameters)
    initial = pattern.initial_parameters(2, q.shape[3], layout.grid)
    given_ = {name: parameters.get(name, value.double()) for name, value in initial.items()}
    truth = torch.stack(
        [
            torch.stack(
                [
                    slow_weights(
                        q[b, :, h], k[b, :, h * k.shape[2] // 2], layout, {n: t[h] for n, t in given_.items()}, keep[b]
                    )
                    @ v[b, :, h * k.shape[2] // 2]
                    for h in range(2)
                ],
                1,
            )
            for b in range(2)
        ]
    )
    assert (out - truth).abs().max() < 1e-9
    inputs = (q, k, v, *parameters.values())
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert ours.isfinite().all() and (ours - theirs).abs().max() < 1e-7 * (1 + theirs.abs().max())


def test_hidden_tokens_are_as_if_they_were_not_there():
    long, short = Layout(12, suffix=5), Layout(12)
    q, k, v = qkv(long, batch=1)
    q[:, 12:], k[:, 12:], v[:, 12:] = 50, 60, 1e6
    out = attention(q, k, v, "wersa(features=16)", long, key_mask=(torch.arange(17) < 12)[None])
    alone = attention(q[:, :12], k[:, :12], v[:, :12], "wersa(features=16)", short)
    assert (out[:, :12] - alone).abs().max() < 1e-12


def test_at_first_all_bands_are_as_they_were():
    """Then it is linear attention of random features, whatever the levels."""
    layout = Layout((6, 7), 1)
    q, k, v = qkv(layout)
    found = [attention(q, k, v, Wersa(levels, 32), layout) for levels in (1, 3)]
    assert (found[0] - found[1]).abs().max() < 1e-12
    rows = visattn.attention_rows(q, k, "wersa(features=32)", layout, range(layout.length))
    own = torch.einsum("bhrs,bshd->brhd", rows, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    assert (own - found[0]).abs().max() < 1e-10
    assert torch.allclose(rows.sum(3), torch.ones(()).double())


def test_features_go_to_the_kernels_of_linear_attention(monkeypatch):
    pytest.importorskip("triton")
    from visattn.kernels.linear.plain import linear_attention
    from visattn.kernels.triton.linear import attention as fused

    seen, plain = [], linear_attention
    monkeypatch.setattr("visattn.kernels.linear.backend.on_gpu", lambda _: Support(True))
    monkeypatch.setattr(fused, "linear_attention", lambda q, k, v, *more: seen.append(more) or plain(q, k, v))
    layout = Layout((4, 4))
    q, k, v = qkv(layout)
    attention(q, k, v, Wersa(1, 256), layout), attention(q, k, v, Wersa(1, 257), layout)
    assert seen == [(None, "given")]


def test_text_and_refusals():
    assert str(Wersa()) == "wersa" and parse("wersa") == Wersa(2, 128)
    assert parse(str(Wersa(3, 64))) == parse("wersa(levels=3, features=64)") == Wersa(3, 64)
    for form, message in {
        "wersa(levels=0)": "levels=0 must be",
        "wersa(features=0)": "features=0 must be one whole number of at least 1$",
        "wersa(levels=2x2)": r"levels=\(2, 2\) must be one whole number of at least 1$",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse(form)
    layout = Layout((4, 4))
    with pytest.raises(ValueError, match="a product with sums over all keys"):
        visattn.dense_mask("wersa", layout)
