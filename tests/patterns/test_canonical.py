"""Equal patterns compare equal, print alike and round-trip through their text: every pattern, every parameter."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from visattn import Layout, dense_mask, parse
from visattn.patterns import (
    PATTERNS,
    SLA,
    SLA2,
    VSA,
    Above,
    Agent,
    AgentSD,
    Best,
    Broadcast,
    Centroids,
    Clear,
    Clipped,
    Dense,
    Flow,
    Gate,
    Gated,
    Groups,
    Halo,
    KMeans,
    Linear,
    Lsh,
    Mala,
    Neighborhood,
    PerHead,
    Pruned,
    Radial,
    Residual,
    Routing,
    Selective,
    Sigmoid,
    SparseLinear,
    TopK,
    TopP,
    VerticalSlash,
    Wersa,
)
from visattn.patterns.linear import FEATURES

REAL = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHARE = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, width=32, exclude_min=True, allow_infinity=False, allow_nan=False)
WORDS = st.sampled_from(sorted(FEATURES))
WHOLE = st.integers(1, 10**6)


def sides(low=1, also=(), dims=None):
    """One value, or one per axis."""
    one = st.integers(low, 40) | st.sampled_from([low, *also])
    some = st.integers(1, 3) if dims is None else st.just(dims)
    return one | some.flatmap(lambda n: st.tuples(*[one] * n))


@st.composite
def neighborhoods(draw):
    dims = draw(st.integers(1, 3))
    values = [draw(sides(also=(-1,), dims=dims)), draw(sides(dims=dims)), draw(sides(dims=dims))]
    flags = draw(st.booleans() | st.tuples(*[st.booleans()] * dims))
    # One of both: they exclude each other.
    values.append({draw(st.sampled_from(["causal", "circular"])): flags})
    return dict(zip(("window", "stride", "dilation"), values, strict=False)) | values[3] | {"kind": Neighborhood}


@st.composite
def halos(draw):
    dims = draw(st.integers(1, 3))
    circular = draw(st.booleans() | st.tuples(*[st.booleans()] * dims))
    block = draw(sides(also=(-1,), dims=dims))
    return {"kind": Halo, "block": block, "halo": draw(sides(0, dims=dims)), "circular": circular}


def made(kind, **parameters):
    return st.fixed_dictionaries({"kind": st.just(kind), **parameters})


STATIC = {
    Dense: made(Dense),
    Neighborhood: neighborhoods(),
    Halo: halos(),
    Clear: made(Clear, radius=WHOLE, pool=st.none() | sides(also=(-1,)), circular=st.booleans()),
    Radial: made(Radial, decay=POSITIVE, sink=st.booleans(), block=WHOLE),
}
INNER = st.one_of(*STATIC.values())
CHOICE = {
    "score": st.sampled_from(["mean", "bounds", "parts(4x4)", "parts(1x2)"]),
    "always": st.sampled_from([None, "self", "self+near(1)", "near(2)+self", "first(1)+window(3x1)", "window(5)"]),
    "per": st.sampled_from(["row", "head", "all"]),
    "rest": st.sampled_from(["drop", "mean", "slope", "linear", "coarse"]),
    "block": sides(),
    "key_block": st.none() | sides(),
    "every": st.integers(1, 9),
    "drift": POSITIVE | st.just(math.inf),
    "share": st.integers(1, 4) | st.just("all"),
    "causal": st.booleans() | st.tuples(st.booleans(), st.booleans()),
}
TOPK = made(TopK, keep=st.floats(0, 1, exclude_min=True) | st.integers(1, 100), **CHOICE)
PARTS = st.one_of(*STATIC.values(), TOPK)
NUMBER = st.floats(0, 1, exclude_min=True) | st.integers(1, 100)
KINDS = STATIC | {
    TopK: TOPK,
    TopP: made(
        TopP,
        p=st.floats(0, 1, exclude_min=True),
        least=NUMBER | st.just(0),
        most=NUMBER,
        rule=st.sampled_from(["cover", "under"]),
        counted=st.booleans(),
        **CHOICE,
    ),
    Above: made(Above, tau=REAL, most=NUMBER, bar=st.sampled_from(["exact", "diag", "share"]), **CHOICE),
    VerticalSlash: made(
        VerticalSlash,
        p=st.floats(0, 1, exclude_min=True),
        tau=st.floats(0, 1),
        least=NUMBER,
        most=NUMBER,
        block=WHOLE,
    ),
    SLA: made(SLA, keep=NUMBER, marginal=NUMBER | st.just("all"), feature=st.sampled_from(["softmax", "elu", "relu"])),
    SLA2: made(
        SLA2,
        keep=NUMBER,
        router=st.sampled_from(["learned", "mean"]),
        ratio=st.sampled_from(["learned", "mass"]),
        soft=st.floats(0, 9),
        block=st.none() | sides(),
    ),
    VSA: made(VSA, keep=NUMBER, gate=st.sampled_from(["token", "channel"]), every=WHOLE, drift=POSITIVE),
    Gate: made(
        Gate,
        by=made(TopK, keep=NUMBER, **(CHOICE | {"every": st.just(1), "rest": st.sampled_from(["drop", "mean"])})),
        dim=st.integers(1, 2**16),
        query=st.sampled_from(["avg", "max+avg"]),
        key=st.sampled_from(["max+min+avg", "avg+min"]),
    ),
    KMeans: made(
        KMeans,
        queries=WHOLE,
        keys=WHOLE,
        p=st.floats(0, 1, exclude_min=True),
        floor=st.floats(0, 1),
        start=st.integers(1, 1000),
        step=st.integers(1, 1000),
    ),
    Pruned: made(Pruned, by=made(TopK, keep=NUMBER, block=sides()), keep=st.floats(0, 1, exclude_min=True)),
    Centroids: made(Centroids, clusters=WHOLE, window=WHOLE),
    Lsh: made(Lsh, planes=st.integers(1, 30), block=WHOLE, samples=st.integers(0, 9), seed=st.integers(0, 9)),
    Best: made(Best, of=st.lists(PARTS, min_size=2, max_size=4), rows=WHOLE, every=WHOLE, drift=POSITIVE),
    PerHead: made(
        PerHead,
        heads=st.tuples(
            st.tuples(st.sampled_from(["0", "0-3", " 1 - 2", 2]), PARTS),
            st.tuples(st.sampled_from(["7-", "5-9"]), PARTS),
        ),
        rest=PARTS,
    ),
    Groups: made(Groups, count=sides()),
    Routing: made(Routing, regions=sides(), topk=WHOLE),
    Agent: made(Agent, agents=sides(also=(-1,))),
    AgentSD: made(
        AgentSD,
        ratio=SHARE,
        agent_ratio=SHARE,
        cell=sides(dims=2),
        late_agent_ratio=SHARE,
        late_cell=sides(dims=2),
        early=st.integers(0, 3) | st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.4]),
        max_downsample=WHOLE,
        read_scale=REAL,
        shortcut=REAL,
        seed=st.integers(0, 2**63),
    ),
    Linear: made(
        Linear,
        feature=WORDS,
        causal=st.sampled_from([False, (True,), (True, False), (False, True, False)]),
        decay=st.sampled_from([0.0, "heads"]) | st.floats(0, 9),
    ),
    Flow: made(Flow),
    Mala: made(Mala),
    Wersa: made(Wersa, levels=st.integers(1, 4), features=st.integers(1, 512)),
    SparseLinear: made(SparseLinear, sparse=INNER, feature=WORDS),
    Sigmoid: made(Sigmoid, sparse=INNER, bias=st.none() | REAL),
    Gated: made(Gated, of=INNER, init=st.floats(0.01, 0.99), rescale=st.booleans()),
    Selective: made(Selective, of=INNER, values=st.booleans()),
    Residual: made(Residual, of=INNER, every=st.integers(2, 9), drift=POSITIVE | st.just(math.inf)),
    Broadcast: made(Broadcast, of=INNER | TOPK, every=st.integers(2, 9), drift=POSITIVE),
    Clipped: made(
        Clipped,
        sparse=INNER,
        alpha=st.none() | st.floats(0, 9),
        gamma=st.none() | st.floats(-1, 0),
        zeta=st.floats(1, 2),
    ),
}


def build(parameters):
    """The pattern of drawn parameters, inner ones included."""

    def inside(value):
        if isinstance(value, list | tuple) and any(isinstance(each, dict | tuple) for each in value):
            return [inside(each) for each in value]
        return build(value) if isinstance(value, dict) else value

    values = {n: inside(v) for n, v in parameters.items() if n != "kind"}
    try:
        return parameters["kind"](**values)
    except ValueError as error:
        # Parameters that exclude each other.
        assume(
            not any(
                word in str(error)
                for word in (
                    "stride",
                    "dilation",
                    "give at least two",
                    "parameters to train",
                    "leave per=",
                    "exclude",
                    "causal is for",
                    "bar=",
                    "fades",
                    "leaves nothing",
                    "keeps its choice",
                )
            )
        )
        raise


@pytest.mark.parametrize("kind", PATTERNS, ids=lambda kind: kind.name)
def test_every_pattern_is_what_its_text_says(kind):
    # What is made of other patterns is drawn until its parts fit each other.
    @settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
    @given(KINDS[kind], KINDS[kind])
    def check(parameters, others):
        pattern, other = build(parameters), build(others)
        again = parse(str(pattern))
        assert type(again) is kind and again == pattern and hash(again) == hash(pattern)
        assert str(again) == str(pattern) and repr(again) == repr(pattern)
        assert (pattern == other) == (str(pattern) == str(other))
        assert pickle.loads(pickle.dumps(pattern)) == pattern

    check()


@settings(deadline=None, max_examples=80)
@given(neighborhoods() | halos(), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_spellings_of_one_pattern_are_one_pattern(parameters, flips):
    """Once a parameter has a value per axis, 2 and 2x2 are the same for the others; lists, arrays, floats too."""
    axes = {len(v) for v in parameters.values() if isinstance(v, tuple)}
    assume(axes)
    names = [name for name in parameters if name != "kind"]
    pattern, other = build(parameters), dict(parameters)
    for name, flip in zip(names, flips, strict=False):
        value = parameters[name]
        if not isinstance(value, tuple) and flip % 2:
            other[name] = (value,) * min(axes)
        elif isinstance(value, tuple) and name not in ("causal", "circular"):
            other[name] = [list(value), tuple(np.array(value)), tuple(map(float, value))][flip % 3]
    several = [name for name in names if isinstance(parameters[name], tuple) and len(set(parameters[name])) == 1]
    if len(several) > 1 and flips[0] % 2:
        other[several[-1]] = parameters[several[-1]][0]
    same = build(other)
    assert same == pattern and str(same) == str(pattern) and hash(same) == hash(pattern)


@pytest.mark.parametrize(
    ("text", "spellings"),
    [
        ("na(window=(7,), causal=true)", [Neighborhood((7,), causal=(True,)), Neighborhood(7, causal=(True,))]),
        ("na(window=7x7, stride=2)", [Neighborhood(7, (2, 2)), parse("na((7, 7), stride=(2,2))")]),
        ("na(window=3x3)", [Neighborhood((3, 3), (1, 1), (1, 1), (False, False)), parse("na(3x3, causal=0x0)")]),
        ("na(window=5x5, causal=1x0)", [Neighborhood(5, causal=(1, 0)), parse("na(5, causal=(true, false))")]),
        ("halo(block=8x8, halo=3)", [Halo(8, (3, 3)), Halo([8.0, 8.0], 3)]),
        ("agent(agents=(7,))", [Agent((7,)), Agent([np.int64(7)])]),
        ("sigmoid(sparse=na(window=(7,)), bias=0.0)", [Sigmoid("na((7,))", -0.0), Sigmoid(Neighborhood((7,)), 0)]),
        ("clipped(sparse=dense)", [Clipped(), Clipped(alpha=4), parse("clipped(zeta=1)")]),
        ("clipped(sparse=dense, gamma=0.0)", [Clipped(gamma=-0.0), Clipped("dense", None, 0)]),
        ("agentsd(ratio=0.0)", [AgentSD(ratio=0), AgentSD(ratio=-0.0, cell=(4, 4), read_scale=np.float64(0.3))]),
        ("agentsd(early=0)", [AgentSD(early=0.0), AgentSD(early=0)]),
        ("radial(decay=2.0)", [Radial(2, sink=1), Radial(np.float32(2), True, block=128.0)]),
    ],
)
def test_text_of_other_spellings(text, spellings):
    assert all(str(pattern) == text and pattern == parse(text) for pattern in spellings)


def test_what_differs_stays_apart():
    assert AgentSD(early=1) != AgentSD(early=1.0) and str(AgentSD(early=1)) != str(AgentSD(early=1.0))
    assert Neighborhood((7,)) != Neighborhood(7), "the second is defined on any number of axes"
    dense_mask(Neighborhood(7), Layout((8, 8)))
    with pytest.raises(ValueError, match=r"window=\(7,\) has 1 value but the grid has 2 axes: give 2 or 1"):
        dense_mask(Neighborhood((7,)), Layout((8, 8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighborhood(3, causal="false"), r"causal='false' must be true or false"),
        (lambda: Neighborhood(3, causal=(True, "no")), r"causal='no' must be true or false"),
        (lambda: Neighborhood(3, causal=2), r"causal=2 must be true or false"),
        (lambda: Radial(sink="yes"), r"sink='yes' must be true or false"),
        (lambda: AgentSD(cell=(4, 4, 4)), r"cell=4x4x4 has 3 values but the grid has 2 axes"),
        (lambda: Neighborhood(float("inf")), r"window=inf must be a whole number"),
        (lambda: Neighborhood(True), r"window=True must be a whole number"),
        (lambda: Halo((2, True), 1), r"block=\(2, True\) must be a whole number"),
        (lambda: parse("na(window=(7,seven))"), r"window=\(7,seven\) in .* is not a number, sizes like 7x7"),
        (lambda: parse("na(window=())"), r"window=\(\) in .* is not a number, sizes like 7x7"),
    ],
)
def test_values_that_have_no_form_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
