"""Gates and temperatures around other patterns, against their formulas in float64 and their authors' outputs."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import fill_value, make_input
from tests.patterns.test_mixed import compare, draw
from tests.support.cases import qkv
from visattn import Layout, attention, explain, parse
from visattn.patterns import Gated, Selective

# One of each kind: static, pooled, routed, dynamic with a tail, sums over all keys, another per head.
INSIDE = (
    "na(window=3)",
    "clear(radius=2, pool=2)",
    "topk(keep=0.5, block=2, rest=mean)",
    "linear(feature=hedgehog)",
    "perhead(heads={1: na(window=3)}, rest=clear(radius=1))",
    "dense",
)
GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "quantizable.pt", weights_only=True)


def linear(x, weight, bias):
    """w . x + b of each head, one head at a time."""
    return torch.stack([x[:, :, h] @ weight[h] + bias[h] for h in range(x.shape[2])], 2)[..., None]


def inner(parameters):
    return {n: p for n, p in parameters.items() if not n.startswith(("gate_", "query_", "value_")) or n == "query_map"}


@pytest.mark.parametrize("of", INSIDE)
@settings(max_examples=3)
@given(data=st.data())
def test_a_gate_multiplies_what_the_pattern_gives(of, data):
    init, rescale = data.draw(st.sampled_from([0.5, 0.9])), data.draw(st.booleans())
    pattern = Gated(of, init, rescale)
    layout, (q, k, v), key_mask, scale, parameters = draw(data, pattern)
    options = {"key_mask": key_mask, "scale": scale}
    out = attention(q, k, v, pattern, layout, parameters=parameters, **options)
    logits = linear(q, parameters["gate_weight"], parameters["gate_bias"]) + math.log(init / (1 - init))
    truth = attention(q, k, v, of, layout, parameters=inner(parameters), **options)
    truth = truth / (1 + (-logits).exp()) / (init if rescale else 1)
    compare(out, truth, (q, k, v, *parameters.values()))


def test_a_gate_around_gates_has_parameters_of_both():
    layout, generator = Layout((4, 5), 1), torch.Generator().manual_seed(0)
    q, k, v = qkv(layout)
    heads, dim = q.shape[2:]
    pattern = parse("gated(of=selective(of=wersa(levels=1, features=8)))")
    shapes = pattern.parameter_shapes(heads, dim, layout.grid)
    assert shapes.keys() == pattern.initial_parameters(heads, dim, layout.grid).keys()
    assert shapes["selective_gate_weight"] == (heads, max(1, dim // 4), 2) and shapes["gate_weight"] == (heads, dim)
    given = {name: torch.randn(shape, generator=generator, dtype=q.dtype) for name, shape in shapes.items()}
    own = {name: given.pop(name) for name in ("gate_weight", "gate_bias")}
    inside = {name.removeprefix("selective_"): value for name, value in given.items()}
    truth = attention(q, k, v, pattern.of, layout, parameters=inside)
    truth = truth * 2 * linear(q, own["gate_weight"], own["gate_bias"]).sigmoid()
    assert torch.allclose(attention(q, k, v, pattern, layout, parameters=own | given), truth)


@pytest.mark.parametrize("of", INSIDE)
@settings(max_examples=3)
@given(data=st.data())
def test_temperatures_scale_queries_and_values(of, data):
    pattern = Selective(of, data.draw(st.booleans()))
    layout, (q, k, v), key_mask, scale, parameters = draw(data, pattern)
    options = {"key_mask": key_mask, "scale": scale}
    out = attention(q, k, v, pattern, layout, parameters=parameters, **options)
    valid = torch.full((2,), layout.length) if key_mask is None else key_mask.sum(1)
    of_length = valid.clamp(min=1).double().log()[:, None, None, None] * parameters["query_length"][:, None]
    wide = q * (1 + linear(q, parameters["query_weight"], parameters["query_bias"]).tanh() + of_length)
    keys, values = (t.repeat_interleave(4 // k.shape[2], 2) for t in (k, v))
    if pattern.values:
        values = values * (1 + linear(values, parameters["value_weight"], parameters["value_bias"]).tanh())
    truth = attention(wide, keys, values, of, layout, parameters=inner(parameters), **options)
    compare(out, truth, (q, k, v, *parameters.values()))


@pytest.mark.parametrize("name", ["gate heads", "gate all"])
def test_outputs_of_the_authors_code(name):
    """Their gate reads the module's input: beside the query, in channels of which keys have zeros."""
    case, x = GOLDEN["cases"][name], make_input(GOLDEN["input_shape"], GOLDEN["input_seed"]).double()
    filled = {key: fill_value(key, shape).double() for key, shape in case["keys"].items()}
    filled["query.weight"] *= 3
    q, k, v = (
        (x @ filled[f"{part}.weight"].T + filled[f"{part}.bias"]).unflatten(2, (3, 8))
        for part in ("query", "key", "value")
    )
    if name == "gate heads":
        read = x.unflatten(2, (3, 8))
        weight = torch.stack([filled[f"alpha.{h}.weight"][0] for h in range(3)])
        bias = torch.cat([filled[f"alpha.{h}.bias"] for h in range(3)])
    else:
        read, weight, bias = x[:, :, None].expand(-1, -1, 3, -1), filled["alpha.weight"], filled["alpha.bias"]
    more = read.shape[3]
    q, parameters = torch.cat([q, read], 3), {"gate_weight": torch.nn.functional.pad(weight, (8, 0)), "gate_bias": bias}
    k, v = (torch.nn.functional.pad(t, (0, more)) for t in (k, v))
    pattern, layout = Gated(rescale=False), Layout(GOLDEN["grid"])
    out = attention(q, k, v, pattern, layout, scale=8**-0.5, parameters=parameters)[..., :8]
    assert (out.flatten(2) - case["output"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "outer", ["gated(of={})", "gated(of={}, init=0.9)", "selective(of={})", "selective(gated({}))"]
)
def test_training_starts_from_the_pattern_inside(outer):
    layout = Layout((6, 5), 2)
    q, k, v = qkv(layout)
    for of in ("na(window=3)", "clipped(alpha=1)", "routing(regions=2, topk=1)"):
        pattern = parse(outer.format(of))
        initial = pattern.initial_parameters(2, 10, layout.grid)
        assert {n: tuple(p.shape) for n, p in initial.items()} == pattern.parameter_shapes(2, 10, layout.grid)
        for parameters in (initial, {}):
            out = attention(q, k, v, pattern, layout, parameters=parameters)
            assert (out - attention(q, k, v, of, layout)).abs().max() < 1e-12


def test_a_selective_query_of_a_longer_sequence_is_as_sharp():
    """c ln N undoes the dilution by more keys of equal logits, to which one stands out."""
    mass = []
    for side in (4, 16):
        layout = Layout((side, side))
        q, k = torch.ones(1, side**2, 1, 1), torch.zeros(1, side**2, 1, 1)
        k[:, 0] = 1
        rows = visattn.attention_rows(
            q, k, "selective(values=false)", layout, [1], parameters={"query_length": torch.ones(1)}, scale=1.0
        )
        mass.append(rows[0, 0, 0, 0])
    plain = [math.e / (math.e + n - 1) for n in (16, 256)]
    assert mass[1] / mass[0] > 0.95 and plain[1] / plain[0] < 0.1


def test_rows_are_the_weights():
    layout = Layout((5, 4), 1)
    q, k, v = qkv(layout, 2)
    made = torch.Generator().manual_seed(0)
    for form in ("gated(of=na(window=3))", "selective(of=topk(keep=0.5, block=2), values=false)"):
        pattern = parse(form)
        shapes = pattern.parameter_shapes(q.shape[2], q.shape[3], layout.grid)
        parameters = {n: torch.randn(s, generator=made, dtype=torch.float64) for n, s in shapes.items()}
        rows = visattn.attention_rows(q, k, pattern, layout, range(21), parameters=parameters)
        out = attention(q, k, v, pattern, layout, parameters=parameters)
        assert (torch.einsum("bhrs,bshd->brhd", rows, v.repeat_interleave(2 // v.shape[2], 2)) - out).abs().max() < 1e-9
    with pytest.raises(ValueError, match="rows have none"):
        visattn.attention_rows(q, k, "selective", layout, [0], parameters={"value_bias": torch.zeros(2)})


def test_lse_and_precision_are_those_of_the_pattern_inside():
    layout = Layout((8, 8))
    q, k, v = (t.float() for t in qkv(layout))
    out, lse = attention(q, k, v, "gated(of=na(window=5))", layout, return_lse=True)
    assert torch.equal(lse, attention(q, k, v, "na(window=5)", layout, return_lse=True)[1])
    rounded = attention(q, k, v, "gated(of=na(window=5))", layout, precision="int8")
    assert torch.equal(rounded, attention(q, k, v, "na(window=5)", layout, precision="int8"))
    assert 0 < (rounded - out).abs().max() < 0.1
    assert explain("gated(of=na(window=5))", layout, q).choice == "wrapped"
    with pytest.raises(ValueError, match="no backend can run gated"):
        attention(q, k, v, "gated(of=linear)", layout, return_lse=True)


def test_compiled_code_learns_the_factors_in_one_graph():
    layout = Layout((5, 4), 1)
    pattern = parse("gated(of=selective(of=na(window=3)))")
    names = pattern.parameter_shapes(2, 10, layout.grid)
    made = torch.Generator().manual_seed(1)
    factors = [torch.randn(s, generator=made, dtype=torch.float64, requires_grad=True) for s in names.values()]

    def step(q, k, v, *factors):
        return attention(q, k, v, pattern, layout, parameters=dict(zip(names, factors, strict=True))).sin()

    torch._dynamo.reset()
    inputs = [*qkv(layout, grad=True), *factors]
    compare(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs), inputs)


def test_text_and_refusals():
    assert (
        parse("gated") == Gated() and str(parse("gated(na(window=3), init=0.9)")) == "gated(of=na(window=3), init=0.9)"
    )
    for form in ("selective(of=gated(of=topk(keep=0.1)), values=False)", "gated(of=best(of=[na(9), na(3)]))"):
        assert parse(str(parse(form))) == parse(form)
    assert parse("gated(of=topk(keep=0.5, every=2))").needs_steps and parse("gated(of=lsh(samples=4))").joins_heads
    refused = {
        "gated(init=1)": "init=1 must be a number between 0 and 1",
        "gated(rescale=2)": "rescale=2 must be true or false",
        "selective(values=none)": "values=None must be true or false",
        "gated(of=agentsd)": "merges tokens before",
        "gated(of=selective(of=gated))": "is gated already",
    }
    for form, message in refused.items():
        with pytest.raises(ValueError, match=message):
            parse(form)
