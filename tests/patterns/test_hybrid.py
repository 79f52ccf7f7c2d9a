"""Patterns with two branches: sla, sla2 and vsa against the published outputs and against formulas written out."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.fill import fill_value, make_input
from tests.support.cases import gradients, layouts, qkv
from tests.support.golden import golden_inputs, near
from visattn import Layout, attention, attention_rows, parse
from visattn.patterns.choice.blocks import token_blocks

FOLDER = Path(__file__).parents[1] / "golden"
SLA = torch.load(FOLDER / "dynamic_sla.pt", weights_only=True)
VSA = [c for c in torch.load(FOLDER / "dynamic_rests.pt", weights_only=True) if c["rest"] == "coarse"]
FORMS = [
    "sla(keep=0.3, {})",
    "sla(keep=2, marginal=0.4, feature=elu, {})",
    "sla(keep=0.2, marginal=1, feature=relu, {}, always=self)",
    "sla2(keep=0.3, {})",
    "sla2(keep=2, router=mean, ratio=mass, feature=elu, {})",
    "vsa(keep=0.3, {})",
    "vsa(keep=0.4, gate=channel, {})",
]


@pytest.mark.parametrize("case", SLA, ids=lambda case: case["feature"])
def test_sla_is_the_original(case):
    q, k, v = golden_inputs(case)
    blocks = f"block={case['query_block']}, key_block={case['key_block']}"
    pattern, layout = parse(f"sla(keep={case['fraction']}, feature={case['feature']}, {blocks})"), Layout(q.shape[1])
    shapes = {"weight": "proj_l.weight", "bias": "proj_l.bias"}
    parameters = {n: fill_value(name, tuple(case["parameters"][name])) for n, name in shapes.items()}
    assert near(attention(q, k, v, pattern, layout, parameters=parameters), case["output"])
    columns = case["mask"].shape[3]
    listed = pattern.choose(q, k, layout, None, q.shape[3] ** -0.5, parameters).mask(0, columns)
    assert torch.equal(listed, case["mask"])


@pytest.mark.parametrize("case", VSA, ids=lambda case: str(case["grid"]))
def test_vsa_is_the_original(case):
    q, k, v = golden_inputs(case)
    keep = case["pattern"].partition("keep=")[2].partition(",")[0]
    pattern, layout, shape = parse(f"vsa(keep={keep}, block=4x4x4)"), Layout(tuple(case["grid"])), case["shape"]
    plain = attention(q, k, v, pattern, layout)
    ones = {"gate": torch.ones(shape[2:])}
    # The original's gate is any number per token and channel.
    added = attention(q, k, v, pattern, layout, parameters=ones) - plain
    assert near(plain + added * make_input(shape, 10 * case["seed"] + 9), case["output"])


def feature_of(name, x):
    if name == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if name == "elu" else x.relu()


def written_out(pattern, q, k, v, layout, valid, parameters, scale):
    """The output of one pattern, sample by sample, head by head, block by block."""
    blocks, at = pattern.blocks(layout.grid), slice(layout.prefix, layout.prefix + layout.tokens)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    mask = None if valid.all() else valid
    choice = pattern.choose(q, k, layout, mask, scale, parameters)
    listed = choice.mask(0, blocks.columns).expand(-1, q.shape[2], -1, -1)
    marginal = None
    if pattern.name == "sla":
        every = torch.ones_like(listed)
        marginal = every if pattern.marginal == "all" else pattern.marginal_blocks(q, k, layout, mask, scale, choice)
    text, group, out = torch.ones(layout.length, dtype=torch.bool), q.shape[2] // k.shape[2], []
    text[at] = False
    for b in range(len(q)):
        heads, ok = [], valid[b, at]
        for h in range(q.shape[2]):
            query, key, value = q[b, :, h], k[b, :, h // group], v[b, :, h // group]
            result = softmax_over(query, key, value, valid[b].expand(len(query), -1), scale)
            means = [mean_of(x, blocks_of, ok) for x, blocks_of in ((query[at], rows), (key[at], columns))]
            there = torch.stack([(columns == j) & ok for j in range(blocks.columns)]).any(1)
            grid = []
            for t in range(layout.tokens):
                i = int(rows[t])
                seen = (text & valid[b]).clone()
                seen[at] = listed[b, h, i, columns] & ok
                soft = softmax_over(query[at][t : t + 1], key, value, seen[None], scale)[0]
                given = (pattern, query[at][t], key[at], value[at], columns, ok, there)
                grid.append(joined(soft, *given, means, i, listed[b, h, i], marginal, (b, h), parameters, scale))
            heads.append(torch.cat([result[: at.start], torch.stack(grid), result[at.stop :]]))
        out.append(torch.stack(heads, 1))
    return torch.stack(out)


def softmax_over(query, key, value, seen, scale):
    logits = (query @ key.T * scale).masked_fill(~seen, float("-inf"))
    blind = ~seen.any(1, keepdim=True)
    return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ value


def mean_of(x, blocks_of, ok):
    found = []
    for i in range(int(blocks_of.max()) + 1):
        inside = (blocks_of == i) & ok
        found.append(x[inside].sum(0) / max(1, int(inside.sum())))
    return torch.stack(found)


def joined(soft, pattern, query, key, value, columns, ok, there, means, i, listed, marginal, where, parameters, scale):
    b, h = where

    def linear(of):
        some = of[columns] & ok
        f = feature_of(pattern.feature, query) @ feature_of(pattern.feature, key[some]).T
        return f @ value[some] / (1e-5 + f.sum())

    if pattern.name == "sla":
        return soft + parameters["weight"] @ linear(marginal[b, h, i]) + parameters["bias"]
    if pattern.name == "vsa":
        if not there.any():
            return soft
        gate = parameters["gate"][h]
        if "gate_map" in parameters:
            gate = gate + query @ parameters["gate_map"][h]
        values = mean_of(value, columns, ok)[there]
        return soft + gate * ((means[1][there] @ means[0][i] * scale).softmax(0) @ values)
    if not (there & ~listed).any():
        return soft
    own, keys = means[0][i], means[1]
    if "route_query" in parameters:
        own, keys = own @ parameters["route_query"][h], keys @ parameters["route_key"][h]
    number = torch.stack([((columns == j) & ok).sum() for j in range(len(keys))])
    mass = torch.exp(keys @ own * scale) * number
    odds = torch.log(mass[listed].sum() / mass[~listed].sum())
    gain, shift = parameters.get("ratio", torch.tensor([[1.0, 0.0]] * 9))[h]
    share = torch.sigmoid(gain * odds + shift)
    return share * soft + (1 - share) * linear(~listed)


@settings(deadline=None, max_examples=4)
@given(
    layout=layouts(sides=(14, 5, 3)),
    form=st.sampled_from(FORMS),
    kv_heads=st.sampled_from([1, 2]),
    masked=st.booleans(),
)
def test_outputs_and_gradients_are_those_written_out(layout, form, kv_heads, masked):
    pattern = parse(form.format(f"block={'x'.join(['2'] * layout.dims) if layout.dims > 1 else 2}"))
    check(pattern, layout, kv_heads, masked)


def check(pattern, layout, kv_heads, masked):
    q, k, v = qkv(layout, 2, kv_heads, 4, batch=2, grad=True)
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    if masked:
        valid = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7
    generator = torch.Generator().manual_seed(1)
    shapes = pattern.parameter_shapes(2, 4, layout.grid)
    parameters = {n: torch.randn(s, generator=generator, dtype=q.dtype).requires_grad_() for n, s in shapes.items()}
    expected = written_out(pattern, q, k, v, layout, valid, parameters, 0.5)
    out = attention(q, k, v, pattern, layout, key_mask=valid if masked else None, parameters=parameters)
    # Rows of hidden tokens mean nothing.
    assert ((out - expected) * valid[..., None, None]).abs().max() < 1e-9
    weight = valid[..., None, None].to(q.dtype)
    inputs = (q, k, v, *parameters.values())
    for a, b in zip(gradients(out * weight, inputs), gradients(expected * weight, inputs), strict=True):
        assert (a - b).abs().max() < 1e-8


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_text_and_padding(form):
    check(parse(form.format("block=2x2")), Layout((3, 5), 2, 1), 1, True)


def test_training_starts_from_the_sparse_pattern():
    layout = Layout((6, 6), 2)
    q, k, v = qkv(layout, 2, dim=4)
    for text in ("sla(keep=0.3, block=2x2)", "vsa(keep=0.3, block=2x2)"):
        pattern = parse(text)
        assert pattern.learnable and not pattern.covers((6, 6))
        initial = pattern.initial_parameters(2, 4, layout.grid)
        for parameters in ({}, initial):
            out = attention(q, k, v, pattern, layout, parameters=parameters)
            assert (out - attention(q, k, v, pattern.front, layout)).abs().max() < 1e-12


def test_the_softmax_branch_in_8_bits():
    layout = Layout((4, 4), 2)
    q, k, v = qkv(layout, 1, dim=16, dtype=torch.float32)
    for text in ("sla(keep=0.5, block=2x2)", "sla2(keep=0.5, block=2x2)", "vsa(keep=0.5, block=2x2)"):
        initial = parse(text).initial_parameters(1, 16, layout.grid)
        exact = attention(q, k, v, text, layout, parameters=initial)
        for precision in ("int8", "fp8"):
            off = attention(q, k, v, text, layout, parameters=initial, precision=precision) - exact
            assert 1e-4 < off.norm() / exact.norm() < 0.05
    with pytest.raises(ValueError, match="soft lists are for training, not for fp8"):
        attention(q, k, v, "sla2(soft=0.1)", layout, precision="fp8")


def test_sla2_that_lists_everything_is_dense():
    layout = Layout((6, 6), 2)
    q, k, v = qkv(layout, 2, dim=4)
    for text in ("sla2(keep=1.0, block=2x2)", "sla2(keep=1.0, block=2x2, soft=0.2)"):
        assert (attention(q, k, v, text, layout) - attention(q, k, v, "dense", layout)).abs().max() < 1e-12


@pytest.mark.parametrize("text", ["sla2(keep=3, block=2x2)", "gate(by=topk(keep=2, block=2x2), dim=3)"])
def test_rows_are_what_values_are_weighed_by(text):
    layout, pattern = Layout((4, 5), 2, 1), parse(text)
    q, k, v = qkv(layout, 2, 1, 4, batch=2)
    mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.8
    made = torch.Generator().manual_seed(1)
    shapes = pattern.parameter_shapes(2, 4, layout.grid)
    parameters = {n: torch.randn(s, generator=made, dtype=q.dtype) for n, s in shapes.items()}
    index = torch.tensor([0, 2, 9, 17, 21, 22])
    rows = attention_rows(q, k, pattern, layout, index, parameters=parameters, key_mask=mask)
    out = attention(q, k, v, pattern, layout, parameters=parameters, key_mask=mask)[:, index]
    given = torch.einsum("bhrs,bshd->brhd", rows, v.expand(-1, -1, 2, -1))
    assert ((out - given) * mask[:, index, None, None]).abs().max() < 1e-12


def test_what_has_no_rows_says_so():
    layout = Layout((4, 4))
    q, k, _ = qkv(layout, 2, dim=4)
    for text in ("sla(keep=2, block=2x2)", "vsa(keep=2, block=2x2)", "sla2(keep=2, block=2x2, soft=0.1)"):
        with pytest.raises(ValueError, match="has no weight for each token: sla2 with hard lists has rows"):
            attention_rows(q, k, text, layout, [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sla(keep=0)", "keep=0 must be a fraction"),
        ("sla(marginal=some)", "marginal='some' must be a fraction like 0.85, a count of blocks, or all"),
        ("sla(marginal=0.0)", "marginal=0.0 must be a fraction"),
        ("sla(marginal=0.5, every=2)", "every=2 keeps critical blocks, not marginal ones"),
        ("sla(feature=hedgehog)", "feature='hedgehog' must be one of softmax, elu, relu"),
        ("sla2(router=random)", "router='random' must be learned or mean"),
        ("sla2(ratio=0.5)", "ratio=0.5 must be learned or mass"),
        ("sla2(soft=-1)", "soft=-1 must be a temperature of at least 0"),
        ("sla2(soft=0.1, always=self)", "always=self forces blocks, which soft=0.1 only weighs"),
        ("vsa(gate=block)", "gate='block' must be token or channel"),
        ("vsa(block=4x4, key_block=2)", "must both be boxes"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text).check((8, 8))
