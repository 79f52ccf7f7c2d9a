"""Texts and values of the patterns that share attention between steps, and what they say of themselves."""

import pytest

import visattn
from visattn import Layout, parse
from visattn.patterns import Broadcast, Neighborhood, Residual
from visattn.scaling import scaled
from visattn.tally import tells


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("residual(of=na(window=9x9))", Residual(Neighborhood((9, 9)))),
        ("residual(na(window=9), every=2, drift=inf)", Residual("na(window=9)", 2, float("inf"))),
        ("broadcast", Broadcast()),
        ("broadcast(every=3)", Broadcast(every=3)),
        ("broadcast(of=na(window=9), drift=0.1)", Broadcast("na(window=9)", drift=0.1)),
        # Lists are kept as long as what is shared.
        ("residual(of=topk(keep=0.1, every=3, drift=inf), every=3)", Residual("topk(keep=0.1)", 3)),
        ("residual(of=topk(keep=0.1, every=3), every=3)", parse("residual(of=topk(keep=0.1), every=3)")),
    ],
)
def test_text(text, pattern):
    found = parse(text)
    assert found == pattern and hash(found) == hash(pattern) and parse(str(found)) == found
    assert found.needs_steps and found.remembers and not found.learnable and not found.needs_weights
    assert tells(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("residual", r"residual needs of, like residual\(of=na\(window=7\)\)"),
        ("residual(every=2)", r"residual needs of"),
        ("residual(of=dense)", r"of=dense of residual leaves nothing .* broadcast\(every=4\)"),
        ("residual(of=agentsd)", "merges tokens before they become queries and keys"),
        ("broadcast(of=agentsd)", "merges tokens before they become queries and keys"),
        ("residual(of=residual(of=na(3)))", r"of residual shares between steps already: give na\(window=3\)"),
        ("residual(of=broadcast)", "shares between steps already: give dense"),
        ("broadcast(of=residual(of=na(3)))", "shares between steps already"),
        ("residual(of=gated(of=na(3)))", "has parameters to train"),
        ("residual(of=sla)", "has parameters to train"),
        ("residual(of=na(3), every=0)", "every=0 must be one whole number of at least 2, the steps that share"),
        ("residual(of=na(3), every=1)", "every=1 must be one whole number of at least 2"),
        ("broadcast(every=1.5)", "every=1.5 must be one whole number of at least 2"),
        ("broadcast(every=2x2)", r"every=\(2, 2\) must be one whole number of at least 2"),
        ("broadcast(every=none)", "every=None must be one whole number of at least 2"),
        ("broadcast(drift=0)", "drift=0 must be a number above 0"),
        ("residual(of=topk(every=2), every=4)", "keeps its choice for 2 steps and residual for every=4: leave every"),
        ("perhead(heads={0: broadcast})", "is a composition: give patterns that are lists of key tiles"),
        ("sigmoid(sparse=broadcast)", "is a composition"),
    ],
)
def test_values_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_gate_may_be_around():
    found = parse("gated(of=residual(of=na(window=3)))")
    assert found.needs_steps and found.learnable and parse(str(found)) == found


def test_what_it_is_on_a_grid():
    assert parse("residual(of=na(window=7))").covers((5, 7)) and not parse("broadcast").covers((5, 7))
    with pytest.raises(ValueError, match="window"):
        parse("residual(of=na(window=(7,)))").check((8, 8))
    assert scaled(parse("residual(of=na(window=5x5), every=2)"), (10, 10), (20, 20)) == parse(
        "residual(of=na(window=11x11), every=2)"
    )
    mask = visattn.dense_mask("residual(of=na(window=3))", Layout((4, 5)))
    assert mask.equal(visattn.dense_mask("na(window=3)", Layout((4, 5))))


def test_it_is_drawn_and_counted_as_what_is_inside():
    from visattn.show import draw
    from visattn.simulate import simulate

    layout = Layout((16, 16), 4)
    assert draw("residual(of=na(window=5))", layout).size[0] > 100
    assert draw("broadcast(of=topk(keep=0.3))", layout).size[0] > 100
    own, window = simulate("residual(of=na(window=5), every=4)", layout), simulate("na(window=5)", layout)
    assert own.density == pytest.approx(window.density + 0.25)
    assert 1 / own.tile_bound == pytest.approx(1 / window.tile_bound + 0.25)
    assert "means over 4 steps" in own.note and own.visited == window.visited
    with pytest.raises(ValueError, match="no list of visible tiles"):
        simulate("residual(of=linear)", layout)
