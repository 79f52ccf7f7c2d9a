"""Sharing between steps as calls of attention: float64 by hand over steps, masks, text, shared key heads, 8 bits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import layouts
from tests.support.oracles import dense_attention
from visattn import Layout, attention, dense_mask, explain, parse
from visattn.patterns.choice.listening import listening
from visattn.patterns.choice.memory import Memory, Place, placed
from visattn.plans import density_of
from visattn.simulate import simulate
from visattn.staged import with_precision

RUN = "run"


class Steps:
    """One call of a module, step by step."""

    def __init__(self, total=None):
        self.memory, self.total, self.told, self.shares = Memory(), total, [], []

    def at(self, step, tensors, pattern, layout, run=RUN, site="m", **options):
        self.memory.begin(run, step, self.total)
        with (
            placed(Place(self.memory, self.memory.key(site))),
            listening(lambda share: self.shares.append(share), sharing=lambda *told: self.told.append(told)),
        ):
            out = attention(*tensors, pattern, layout, **options)
        self.memory.finish()
        return out

    @property
    def refreshed(self):
        return [refreshed for refreshed, _ in self.told]


def drawn(layout, heads=2, kv_heads=2, dim=4, batch=1, seed=0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    shapes = [(batch, layout.length, n, dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(torch.randn(shape, generator=made, dtype=dtype) for shape in shapes)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_steps_by_hand(data):
    """Steps that are skipped count: an output serves so many steps, not so many calls."""
    layout = data.draw(layouts(sides=(9, 5, 3)))
    every, kind = data.draw(st.integers(2, 4)), data.draw(st.sampled_from(["residual", "broadcast"]))
    kv_heads, masked = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    steps = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1)))
    total = data.draw(st.sampled_from([None, 10]))
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
        key_mask[:, -1] = True
    shown = torch.ones(2, layout.length, dtype=torch.bool) if key_mask is None else key_mask
    window = dense_mask("na(window=3)", layout)[None] & shown[:, None]
    pattern = f"{kind}(of=na(window=3), every={every}, drift=inf)"
    run, kept = Steps(total), None
    for step in steps:
        q, k, v = drawn(layout, 4, kv_heads, batch=2, seed=step)
        dense = dense_attention(q, k, v, shown[:, None].expand(-1, layout.length, -1), 0.5)
        inside = dense_attention(q, k, v, window, 0.5)
        if kept is None or step - kept[0] >= every:
            kept = step, dense - inside if kind == "residual" else inside
            truth = dense if kind == "residual" else inside
        else:
            truth = inside + kept[1] if kind == "residual" else kept[1]
        out = run.at(step, (q, k, v), pattern, layout, scale=0.5, key_mask=key_mask)
        assert (out - truth).abs().max() < 1e-10


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_a_batch_of_two_is_two_of_one(data):
    layout = data.draw(layouts(sides=(9, 5, 3)))
    text = data.draw(st.sampled_from(["residual(of=na(window=3), drift=inf)", "broadcast(drift=inf)"]))
    whole, one, other = Steps(), Steps(), Steps()
    for step in range(4):
        tensors = drawn(layout, batch=2, seed=step)
        out = whole.at(step, tensors, text, layout)
        alone = [run.at(step, [t[i : i + 1] for t in tensors], text, layout) for i, run in enumerate((one, other))]
        assert (out - torch.cat(alone)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["residual(of=na(window=3), ", "broadcast("])
def test_what_is_kept_is_for_the_same_call_alone(kind):
    """Another grid, side, text, batch, number of heads, dtype, scale, mask, precision, module or run computes anew."""
    layout, pattern = Layout((4, 6), 2), f"{kind}every=4, drift=inf)"
    plain = drawn(layout)
    masks = {"key_mask": torch.ones(1, layout.length, dtype=torch.bool)}
    others = [
        (plain, pattern, layout, {}, False),
        (drawn(layout), pattern, Layout((6, 4), 2), {}, True),
        (drawn(layout), pattern, Layout((4, 6), 0, 2), {}, True),
        (drawn(layout, batch=2), pattern, layout, {}, True),
        (drawn(layout, heads=4), pattern, layout, {}, True),
        (drawn(layout, dtype=torch.float32), pattern, layout, {}, True),
        (plain, pattern, layout, {"scale": 0.3}, True),
        (plain, pattern, layout, masks, True),
        (plain, pattern, layout, {"site": "n"}, True),
        (plain, pattern.replace("every=4", "every=5"), layout, {}, True),
        (plain, pattern, layout, {"run": "another"}, True),
    ]
    for tensors, text, where, options, anew in others:
        run = Steps()
        run.at(0, plain, pattern, layout)
        out = run.at(1, tensors, text, where, **options)
        assert run.refreshed == [True, anew]
        if anew:
            options = {n: o for n, o in options.items() if n not in ("site", "run")}
            assert torch.equal(out, attention(*tensors, "dense", where, **options))


def test_what_is_kept_goes_when_no_step_needs_it():
    layout = Layout((4, 6))
    run = Steps(total=5)
    sizes = []
    for step in (0, 1, 2, 3, 4):
        run.at(step, drawn(layout), "broadcast(every=2, drift=inf)", layout)
        sizes.append(len(run.memory))
    assert sizes == [1, 0, 1, 0, 0] and run.refreshed == [True, False, True, False, True]
    assert [nbytes for _, nbytes in run.told] == [24 * 2 * 4 * 8] * 4 + [0], "the last step keeps nothing"
    # A run that is dense from some step on, or skips a module.
    run = Steps(total=9)
    run.at(0, drawn(layout), "broadcast(every=3, drift=inf)", layout)
    run.memory.begin(RUN, 2, 9)
    assert len(run.memory) == 1
    run.memory.begin(RUN, 3, 9)
    assert not len(run.memory)


@pytest.mark.parametrize("moved", ["q", "k", "v", "samples"])
def test_what_moves_refreshes(moved):
    """Also samples in another order."""
    texts = "residual(of=na(window=3x3), every=9)", "broadcast(every=9)"
    for layout, text in itertools.product((Layout((8, 16)), Layout((2, 5), 1)), texts):
        run, tensors = Steps(), dict(zip("qkv", drawn(layout, batch=2), strict=True))
        run.at(0, tensors.values(), text, layout)
        run.at(1, [1.05 * t for t in tensors.values()], text, layout)
        others = {n: t.flip(0) for n, t in tensors.items()} if moved == "samples" else {moved: 2 * tensors[moved]}
        out = run.at(2, (tensors | others).values(), text, layout)
        assert run.refreshed == [True, False, True]
        assert torch.equal(out, attention(*(tensors | others).values(), "dense", layout))
        # What is added to all keys changes nothing; what is compared with is the last refresh.
        moved_keys = tensors | others
        run.at(3, [moved_keys["q"], moved_keys["k"] + 9.0, moved_keys["v"]], text, layout)
        assert run.refreshed[-1] is False


def test_padding_does_not_drift():
    layout = Layout((8, 8), 4)
    valid = torch.ones(1, layout.length, dtype=torch.bool)
    valid[:, :2] = False
    run = Steps()
    for step in range(2):
        q, k, v = (t.clone() for t in drawn(layout))
        for t in (k, v):
            t[:, :2] = step * 1000
        out = run.at(step, (q, k, v), "broadcast(drift=0.01)", layout, key_mask=valid)
    assert run.refreshed == [True, False] and out.isfinite().all()


def test_nobody_writes_into_what_is_kept():
    layout = Layout((4, 6))
    run, tensors = Steps(), drawn(layout)
    truth = attention(*tensors, "dense", layout)
    for step in range(3):
        out = run.at(step, tensors, "broadcast(every=3, drift=inf)", layout)
        assert torch.equal(out, truth)
        out.zero_()


def test_with_gradients_every_call_is_dense_and_nothing_is_kept():
    layout = Layout((4, 6))
    for text in ("residual(of=na(window=3), drift=inf)", "broadcast(drift=inf)", "residual(of=topk(keep=1, block=2))"):
        run = Steps()
        for step in range(2):
            tensors = [t.requires_grad_() for t in drawn(layout, seed=step)]
            run.at(step, tensors, text, layout).square().sum().backward()
            truth = [t.detach().clone().requires_grad_() for t in tensors]
            attention(*truth, "dense", layout).square().sum().backward()
            for ours, theirs in zip(tensors, truth, strict=True):
                assert torch.equal(ours.grad, theirs.grad)
        assert run.told == [(True, 0)] * 2 and not len(run.memory)
        with torch.no_grad():
            run.at(2, tensors, text, layout)
        assert len(run.memory) > 0


def test_lists_are_those_of_the_refresh(monkeypatch):
    """What `of` chooses holds as long as the difference to it does, and goes with it."""
    from visattn.patterns import DynamicPattern

    chosen, real = [], DynamicPattern._chosen
    monkeypatch.setattr(DynamicPattern, "_chosen", lambda *given: chosen.append(0) or real(*given))
    layout, topk = Layout((4, 8)), "topk(keep=0.3, block=2)"
    run, counts = Steps(), []
    for step in range(6):
        tensors = drawn(layout, seed=step)
        out = run.at(step, tensors, f"residual(of={topk}, every=3, drift=inf)", layout, backend="auto")
        counts.append(len(chosen))
        if step % 3 == 0:
            first, kept = tensors, attention(*tensors, "dense", layout) - attention(*tensors, topk, layout)
            del chosen[-1:]
            continue
        seen = visattn.patterns.routed_mask(parse(topk), layout, *first[:2])
        del chosen[-1:]
        assert (out - dense_attention(*tensors, seen, 0.5) - kept).abs().max() < 1e-10
    assert counts == [1, 1, 1, 2, 2, 2] and len(run.memory) <= 2


@pytest.mark.parametrize("of", ["linear", "agent(agents=2)", "kmeans(queries=2, keys=3)", "routing(regions=2, topk=1)"])
def test_any_pattern_may_be_inside(of):
    layout = Layout((4, 6), 1)
    run, tensors = Steps(), drawn(layout)
    for step in range(2):
        out = run.at(step, tensors, f"residual(of={of})", layout)
        assert (out - attention(*tensors, "dense", layout)).abs().max() < 1e-12
    assert run.refreshed == [True, False]


def test_in_8_bits_the_difference_mends_the_rounding():
    layout = Layout((8, 8))
    run, tensors = Steps(), drawn(layout, dim=16, dtype=torch.float32)
    truth = attention(*tensors, "dense", layout)
    for step in range(2):
        out = run.at(step, tensors, "residual(of=na(window=5))", layout, precision="int8")
        assert (out - truth).abs().max() < 1e-5
    plain = attention(*tensors, "na(window=5)", layout)
    assert (attention(*tensors, "na(window=5)", layout, precision="int8") - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match="8 bits are for patterns that list key tiles"):
        with_precision("broadcast in int8")
    assert with_precision("broadcast(na(window=5)) in int8")[1] == "int8"


def test_density_is_what_was_computed():
    """A refresh computes dense attention and the pattern; who only shares a window computes that."""
    layout = Layout((6, 8), 3)
    share = {text: visattn.plan(text, layout).density for text in ("na(window=3)", "dense")}
    for text, expected in (
        ("residual(of=na(window=3), every=2)", [1 + share["na(window=3)"], share["na(window=3)"]]),
        ("broadcast(of=na(window=3))", [share["na(window=3)"], 0]),
        ("broadcast", [1, 0]),
    ):
        run, tensors, every = Steps(), drawn(layout), layout.length**2
        for step in range(2):
            run.at(step, tensors, text, layout)
        found = [(float(s.mean()) * layout.tokens**2 + every - layout.tokens**2) / every for s in run.shares]
        assert found == pytest.approx(expected)
        assert density_of(parse(text), layout) == pytest.approx(sum(expected) / 2)
        assert simulate(text, layout).density == pytest.approx(sum(expected) / 2)


def test_estimates_are_means_over_the_steps():
    layout, q = Layout((64, 64)), torch.zeros(1, 4096, 4, 64)
    costs = {}
    for text in (
        "na(window=9)",
        "residual(of=na(window=9), every=2)",
        "residual(of=na(window=9), every=8)",
        "broadcast",
    ):
        found = explain(text, layout, q)
        costs[text] = next(c.cost for c in found.candidates if c.backend.name == found.choice)
        dense = found.problem.dense_pairs
    na, two, eight, half = costs.values()
    assert na + 0.5 * dense < two < na + 0.6 * dense and na + 0.125 * dense < eight < na + 0.2 * dense
    assert 0.5 * dense < half < 0.6 * dense
    text = str(explain("broadcast(every=4)", layout, q))
    assert "on average: one refresh in 4 steps" in text
    with torch.enable_grad():
        learning = explain("broadcast(every=4)", layout, q.clone().requires_grad_())
    assert min(c.cost for c in learning.candidates if c.support.ok) > 0.9 * dense


def test_auto_keeps_dense_what_is_not_faster_on_average():
    """The mean decides: on a GPU, a window as large as half of the grid with one dense step in two is no gain."""
    from visattn.crossing import crossing
    from visattn.problem import Problem

    def found(text, **options):
        given = {"device": "cuda", "dtype": torch.bfloat16, **options}
        layout = Layout((64, 64))
        return crossing(Problem(parse(text), layout, 1, 24, 24, 128, **given))

    assert found("residual(of=na(window=57), every=2)").dense_pays
    assert not found("broadcast(every=2, drift=inf)").dense_pays and not found("broadcast(every=4)").dense_pays
    assert found("broadcast(every=2)", grad=True) is None and found("residual(of=linear)") is None
    assert not math.isinf(found("broadcast(every=2)").sparse_ms)


def test_who_cannot_share_says_so():
    layout = Layout((4, 6))
    q, k, v = drawn(layout)
    for text in ("residual(of=na(window=3))", "broadcast(every=4)"):
        with pytest.raises(
            ValueError, match=r"keeps something .* knows no steps: apply\(\) it to a pipeline, or give "
        ):
            attention(q, k, v, text, layout)
        run = Steps()
        run.at(0, (q, k, v), text, layout)
        with pytest.raises(ValueError, match="knows no steps"):
            # Prepared by now.
            attention(q, k, v, text, layout)
        with pytest.raises(ValueError, match="kept has no log-sum-exp"):
            run.at(1, (q, k, v), text, layout, return_lse=True)
        with pytest.raises(ValueError, match="which is no weight of a token: ask for the rows of"):
            visattn.attention_rows(q, k, text, layout, [0])
        with pytest.raises(ValueError, match="chooses none"):
            visattn.tile_choice(q, k, text, layout)
        with pytest.raises(ValueError, match="is for self-attention"):
            run.at(1, (q, k[:, :6], v[:, :6]), text, layout, key_layout=Layout((2, 3)))
        with pytest.raises(ValueError, match="has no relative position bias"):
            run.at(1, (q, k, v), text, layout, rpb=torch.zeros(2, 5, 5, dtype=q.dtype))
        with pytest.raises(ValueError, match="no tile plan: it is what an earlier step kept"):
            visattn.plan(text, layout)


def test_transforms_keep_nothing():
    layout, run = Layout((4, 6)), Steps()
    q, k, v = drawn(layout, batch=2)

    def one(q, k, v):
        return run.at(0, (q[None], k[None], v[None]), "broadcast(drift=inf)", layout)[0]

    out = torch.func.vmap(one)(q, k, v)
    assert (out - attention(q, k, v, "dense", layout)).abs().max() < 1e-12
    assert all(not torch._C._functorch.is_functorch_wrapped_tensor(kept.value) for kept in run.memory._kept.values())
