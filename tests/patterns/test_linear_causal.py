"""Linear attention with a causal axis and decay against dense matrices of weights, and its authors' outputs."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import make_input
from tests.patterns.test_linear import slow_features
from tests.patterns.test_mixed import compare, draw
from tests.support.cases import qkv
from visattn import Layout, attention, parse
from visattn.kernels.linear import causal
from visattn.patterns import Linear
from visattn.patterns.linear import FEATURES

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "lightning.pt", weights_only=True)


def factors(pattern, layout, heads):
    """What of each product counts, pair by pair: [H, S, S]."""
    places = [None] * layout.prefix + list(itertools.product(*map(range, layout.grid))) + [None] * layout.suffix
    axis, found = pattern.causal.index(True), torch.ones(heads, layout.length, layout.length, dtype=torch.float64)
    for (i, one), (j, other) in itertools.product(enumerate(places), enumerate(places)):
        if one is None or other is None:
            continue
        steps = one[axis] - other[axis]
        for h in range(heads):
            rate = 2 ** (-8 * (h + 1) / heads) if pattern.decay == "heads" else pattern.decay
            found[h, i, j] = 0 if steps < 0 else torch.tensor(-rate * steps, dtype=torch.float64).exp()
    return found


def slow(q, k, v, pattern, layout, key_mask, parameters):
    heads, rows = q.shape[2], []
    of, eye = factors(pattern, layout, heads), torch.eye(q.shape[3], dtype=q.dtype).expand(heads, -1, -1)
    for b, h in itertools.product(range(q.shape[0]), range(heads)):
        other = h * k.shape[2] // heads
        fq = slow_features(q[b, :, h], pattern.feature, parameters.get("query_map", eye)[h])
        fk = slow_features(k[b, :, other], pattern.feature, parameters.get("key_map", eye)[h])
        weights = fq @ fk.T * of[h] * (1 if key_mask is None else key_mask[b])
        total = weights.sum(1, keepdim=True)
        rows.append(weights @ v[b, :, other] / total.where(total > 0, torch.ones_like(total)))
    return torch.stack(rows).view(q.shape[0], heads, q.shape[1], -1).transpose(1, 2)


@pytest.mark.parametrize("feature", FEATURES)
@settings(max_examples=6)
@given(data=st.data())
def test_it_equals_its_formula_with_gradients(feature, data):
    tile, decay = data.draw(st.sampled_from([1, 3, 8, 64])), data.draw(st.sampled_from([0, 0.3, 2.0, "heads"]))
    layout, (q, k, v), key_mask, _, parameters = draw(data, Linear(feature))
    axis = data.draw(st.integers(0, layout.dims - 1))
    pattern = Linear(feature, tuple(i == axis for i in range(layout.dims)), decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal, "TILE", tile)
        out = attention(q, k, v, pattern, layout, key_mask=key_mask, parameters=parameters)
    compare(out, slow(q, k, v, pattern, layout, key_mask, parameters), (q, k, v, *parameters.values()))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: str(c["shape"]))
def test_outputs_of_the_authors_code(case):
    """Their product over their sum of weights; relu leaves these queries and keys as they are."""
    q, k, v = (make_input(case["shape"], seed).double().transpose(1, 2) for seed in range(3))
    pattern = Linear("relu", True, "heads")
    assert torch.allclose(causal.decay_rates(pattern, q.shape[2], q), case["slopes"].double())
    out = attention(q.abs(), k.abs(), v, pattern, Layout((q.shape[1],)))
    truth = (case["product"] / case["total"][..., None]).transpose(1, 2)
    assert (out - truth).abs().max() < 1e-5


def test_a_state_of_what_was_before_goes_on():
    """Two halves of the positions, the second with the first's state, are the whole."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(2, 9, 3, 2, 4, generator=made, dtype=torch.float64) for _ in range(3))
    rates = torch.tensor([0.2, 1.0], dtype=torch.float64)
    whole = causal.earlier(q, k, v, rates)
    left = torch.einsum("bnrhf,nh,bnrhd->bhfd", k[:, :5], (-torch.arange(5)[:, None].flip(0) * rates).exp(), v[:, :5])
    after = causal.earlier(q[:, 5:], k[:, 5:], v[:, 5:], rates, left)
    assert (after - whole[:, 5:]).abs().max() < 1e-12


def test_later_frames_change_nothing_and_text_sees_all():
    layout = Layout((4, 3, 2), 2, 1)
    q, k, v = qkv(layout)
    form = "linear(causal=1x0x0, decay=0.5)"
    out = attention(q, k, v, form, layout)
    for t in (k, v):
        t[:, 2 + 6 * 3 : 2 + 6 * 4] += 1
    moved = (attention(q, k, v, form, layout) - out).abs().amax((0, 2, 3))
    assert (moved[2:20] < 1e-12).all() and (moved[20:26] > 1e-3).all() and (moved[[0, 1, 26]] > 1e-3).all()


def test_rows_are_its_weights():
    layout = Layout((5, 4), 1, 2)
    q, k, v = qkv(layout, 2)
    form = "linear(feature=relu, causal=0x1, decay=heads)"
    rows = visattn.attention_rows(q, k, form, layout, range(layout.length))
    out = torch.einsum("bhrs,bshd->brhd", rows, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
    assert (out - attention(q, k, v, form, layout)).abs().max() < 1e-10


def test_long_sequences_in_bfloat16():
    layout, made = Layout((4096,)), torch.Generator().manual_seed(0)
    half = [(torch.rand(1, 4096, 2, 16, generator=made) * 2 - 1).bfloat16() for _ in range(3)]
    for form in ("linear(causal=true)", "linear(causal=true, decay=heads)", "linear(causal=true, decay=80)"):
        out, truth = (attention(*t, form, layout) for t in (half, [x.double() for x in half]))
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


def test_text_and_refusals():
    assert str(parse("linear(causal=0x0)")) == "linear(feature=elu)" == str(Linear(causal=False))
    for form in ("linear(feature=relu, causal=1x0x0, decay=0.5)", "linear(causal=true, decay=heads)"):
        assert parse(str(parse(form))) == parse(form)
    assert parse("linear(causal=true)") == Linear(causal=(True,)) and Linear(causal=[1, 0]) == Linear(
        causal=(True, False)
    )
    refused = {
        "linear(causal=1x1)": "true for at most one",
        "linear(causal=2)": "must be true or false",
        "linear(decay=0.5)": "give a causal axis too, like causal=1x0x0",
        "linear(causal=1x0, decay=-1)": "must be a number of at least 0, or heads",
        "linear(causal=1x0, decay=head)": "must be a number of at least 0, or heads",
    }
    for form, message in refused.items():
        with pytest.raises(ValueError, match=message):
            parse(form)
    layout = Layout((3, 3))
    with pytest.raises(ValueError, match="is for grids of 3 axes, not 2"):
        attention(*qkv(layout), "linear(causal=1x0x0)", layout)
    with pytest.raises(ValueError, match="sums over keys of earlier positions"):
        visattn.dense_mask("linear(causal=1x0)", layout)
    assert parse("linear(causal=1x0, decay=heads)").joins_heads and not parse("linear(causal=1x0)").joins_heads
