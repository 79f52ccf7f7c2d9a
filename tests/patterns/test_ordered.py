"""Patterns in the order of the content: clusters, hashes, and the tiles that sorted tokens make."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.fill import make_input
from tests.support.cases import gradients, layouts, qkv
from visattn import Layout, attention, attention_rows, parse
from visattn.kernels.ordered import order, slots_of
from visattn.patterns import kmeans as clusters_of
from visattn.patterns import lsh as hashing
from visattn.patterns.choice.clusters import first_centres, k_means
from visattn.patterns.choice.memory import Memory, Place, placed
from visattn.problem import Call

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_ordered.pt", weights_only=True)


def golden_inputs(case):
    batch, length, heads, dim = case["shape"]
    run, found = case.get("run", 64), []
    for i in range(3):
        noise = make_input((batch, length, heads, dim), 10 * case["seed"] + i)
        levels = make_input((batch, -(-length // run), heads, dim), 10 * case["seed"] + 5 + i)
        found.append(noise + case.get("level", 1.0) * levels.repeat_interleave(run, 1)[:, :length])
    return found


def near(out, stored):
    found = out.reshape(-1)[:: stored["stride"]][: len(stored["values"])]
    return (found - stored["values"]).abs().max() < 1e-4 * stored["values"].std()


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["method"] == "svg2"], ids=lambda c: str(c["shape"]))
def test_clusters_and_output_are_those_of_sparse_videogen_2(case, monkeypatch):
    def started(x, number, valid=None):
        return x[:, :, torch.arange(number) * (x.shape[2] // number)]

    monkeypatch.setattr(clusters_of, "first_centres", started)
    q, k, v = golden_inputs(case)
    length = case["shape"][1]
    numbers = {"queries": case["query_clusters"], "keys": case["key_clusters"]}
    for name, x in (("query", q), ("key", k)):
        x = x.transpose(1, 2)
        found = k_means(x, started(x, case[f"{name}_clusters"]), case["iterations"], None)
        assert torch.equal(found.ids[0], case[f"{name}_ids"].long())
        assert (found.centres[0] - case[f"{name}_centres"]).abs().max() < 1e-5
    text = f"kmeans(queries={numbers['queries']}, keys={numbers['keys']}, p={case['p']}, floor={case['floor']}"
    pattern = parse(f"{text}, start={case['iterations']})")
    assert torch.equal(pattern.cluster(q, k, Layout(length)).listed, case["mask"])
    for backend in ("reference", "ordered"):
        assert near(attention(q, k, v, pattern, Layout(length), backend=backend), case["output"])


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["method"] == "hyper"], ids=lambda c: f"{c['samples']} samples")
def test_runs_and_samples_are_those_of_hyper_attention(case, monkeypatch):
    q, k, v = golden_inputs(case)
    planes = make_input((1, 1, q.shape[3], case["projections"]), case["seed"])[0, 0]
    monkeypatch.setattr(hashing, "projections", lambda *_: planes)
    monkeypatch.setattr(hashing, "sampled", lambda *_: order_of_keys(k, planes, case))
    pattern = parse(f"lsh(planes={case['projections']}, block={case['block']}, samples={case['samples']})")
    for backend in ("reference", "ordered"):
        out, lse = attention(q, k, v, pattern, Layout(q.shape[1]), backend=backend, return_lse=True)
        assert near(out, case["output"]) and near(lse, case["lse"])


@pytest.mark.parametrize("text", ["kmeans(queries=3, keys=5, p=0.6)", "lsh(planes=3, block=4, samples=6)"])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_the_weights_of_the_output(text, masked):
    layout = Layout((4, 5), 2, 1)
    q, k, v = qkv(layout, 4, 2, dim=6, batch=2)
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    weights = attention_rows(q, k, text, layout, torch.arange(23), key_mask=mask)
    out = attention(q, k, v, text, layout, key_mask=mask)
    assert (torch.einsum("bhrs,bshd->brhd", weights, v.repeat_interleave(2, 2)) - out).abs().max() < 1e-10


def order_of_keys(k, planes, case):
    """The original draws places in the sorted keys: their tokens."""
    bits = (k.transpose(1, 2) @ planes > 0).long()
    bucket = (bits << torch.arange(case["projections"])).sum(-1)
    by_rank = (bucket ^ (bucket >> 1)).sort(dim=-1, stable=True).indices
    return by_rank.gather(2, case["sampled_positions"])


TEXTS = (
    "kmeans(queries=3, keys=5, p=0.5, floor=0.2, start=3)",
    "kmeans(queries=1, keys=2, p=0.9, floor=0.0, start=1)",
    "lsh(planes=3, block=4, samples=3)",
    "lsh(planes=2, block=7, samples=0)",
)


@settings(deadline=None, max_examples=12)
@given(
    layout=layouts(sides=(40, 8, 5)),
    text=st.sampled_from(TEXTS),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
)
def test_sorted_tiles_give_what_the_mask_gives(layout, text, kv_heads, masked):
    """Outputs and gradients, text on both sides, padding, grouped heads; and a batch is its samples."""
    pattern = parse(text)
    if "kmeans" in text and layout.tokens < pattern.keys:
        with pytest.raises(ValueError, match="clusters are more than"):
            pattern.check(layout.grid)
        return
    q, k, v = qkv(layout, 4, kv_heads, 6, batch=2, grad=True)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.6
        key_mask[0, layout.prefix : layout.prefix + layout.tokens // 2] = False
    options = {"key_mask": key_mask, "return_lse": True}
    expected, lse = attention(q, k, v, pattern, layout, backend="reference", **options)
    wanted = gradients(expected, (q, k, v))
    found, found_lse = attention(q, k, v, pattern, layout, backend="ordered", **options)
    assert (found - expected).abs().max() < 1e-10
    assert torch.equal(found_lse.isinf(), lse.isinf())
    assert (found_lse - lse).nan_to_num(0.0).abs().max() < 1e-10
    plain = attention(q, k, v, pattern, layout, backend="ordered", key_mask=key_mask)
    for out in (found, plain):
        for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True):
            assert (a - b).abs().max() < 1e-9
    for b in range(2):
        own = None if key_mask is None else key_mask[b : b + 1]
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern, layout, key_mask=own, backend="ordered")
        assert (alone - found[b : b + 1]).abs().max() < 1e-10


def test_the_mask_is_that_of_tokens_grouped_by_hand():
    layout = Layout((4, 6), 2, 1)
    q, k, v = qkv(layout, 2, dim=4)
    for text in ("kmeans(queries=3, keys=4, p=0.4, floor=0.0, start=2)", "lsh(planes=2, block=6, samples=4)"):
        pattern = parse(text)
        groups = pattern.cluster(q, k, layout)
        for head in range(2):
            logits = torch.full((layout.length, layout.length), -torch.inf, dtype=torch.float64)
            for i in range(layout.length):
                for j in range(layout.length):
                    inside = 2 <= i < 26 and 2 <= j < 26
                    pair = (groups.queries[0, head, i - 2], groups.keys[0, head, j - 2]) if inside else None
                    if pair is None or groups.listed[0, head][pair]:
                        logits[i, j] = q[0, i, head] @ k[0, j, head] / 2
            weights = [logits]
            values = [v[0, :, head]]
            if groups.extra is not None:
                tokens = groups.extra[0, head] + 2
                more = q[0, :, head] @ k[0, tokens, head].T / 2 + groups.weight[0, head]
                more[:2], more[26:] = -torch.inf, -torch.inf
                weights.append(more)
                values.append(v[0, tokens, head])
            expected = torch.cat(weights, 1).softmax(1) @ torch.cat(values)
            for backend in ("reference", "ordered"):
                out = attention(q, k, v, pattern, layout, backend=backend)[0, :, head]
                assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("text", ["kmeans(queries=3, keys=5, start=2)", "lsh(planes=3, block=4, samples=6)"])
def test_padding_groups_nothing(text):
    """Whatever stands in hidden tokens, the others have the same groups: centres begin at none of them."""
    layout, pattern = Layout((5, 6), 2), parse(text)
    q, k, _ = qkv(layout, 2, dim=6)
    mask = torch.rand(1, 32, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[0, :2], mask[0, 2:8] = True, False
    other = [torch.where(mask[..., None, None], t, torch.full_like(t, 9.0)) for t in (q, k)]
    ours, theirs = pattern.cluster(q, k, layout, mask), pattern.cluster(*other, layout, mask)
    shown = mask[0, 2:]
    assert torch.equal(ours.queries[..., shown], theirs.queries[..., shown])
    assert torch.equal(ours.keys[..., shown], theirs.keys[..., shown])
    # A sample without its padding has the same clusters.
    if "kmeans" in text:
        alone = pattern.cluster(q[:, mask[0]], k[:, mask[0]], Layout(int(shown.sum()), 2))
        assert torch.equal(alone.keys, ours.keys[..., shown]) and torch.equal(alone.listed, ours.listed)


def test_fewer_valid_tokens_than_clusters():
    layout = Layout(12)
    q, k, v = qkv(layout, 2, dim=4, batch=2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 2:], mask[1] = False, False
    expected = attention(q, k, v, "kmeans(queries=4, keys=5, p=1.0)", layout, key_mask=mask, backend="reference")
    assert (expected - attention(q, k, v, "dense", layout, key_mask=mask))[0, :2].abs().max() < 1e-12
    found = attention(q, k, v, "kmeans(queries=4, keys=5, p=1.0)", layout, key_mask=mask, backend="ordered")
    assert (found - expected).abs().max() < 1e-12 and (found[1] == 0).all()
    # Many channels, so that products of equal centres differ by rounding: nobody may tell them apart.
    x = 100 * torch.rand(1, 2, 12, 67, generator=torch.Generator().manual_seed(0))
    valid = mask[:1]
    groups = k_means(x, first_centres(x, 11, valid), 2, valid)
    assert (groups.ids < 2).all() and groups.sizes.sum() == 4 and (groups.sizes[..., :2] == 1).all()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_weights_of_samples_are_added_whatever_the_scale_is(scale):
    text, layout = "lsh(planes=3, block=4, samples=6)", Layout((4, 5), 2, 1)
    tensors = qkv(layout, 2, 1, dim=6, batch=2, grad=True)
    found = []
    for backend in ("reference", "ordered"):
        out = attention(*tensors, text, layout, scale=scale, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for expected, own in zip(*found, strict=True):
        assert (own - expected).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [None, -0.01])
def test_samples_are_hidden_from_text_in_half_precision(scale):
    """What hides them, over the factor on the logits, is more than the largest number of half precision."""
    layout, text = Layout((8, 8), 3), "lsh(planes=3, block=8, samples=6)"
    wide = qkv(layout, 2, dim=64)
    expected = attention(*wide, text, layout, scale=scale, backend="reference")
    for backend in ("ordered", "reference"):
        out = attention(*(t.half() for t in wide), text, layout, scale=scale, backend=backend)
        # Half precision may sort a token into another run, but not every other one.
        assert (out - expected).abs().median() < 2e-3
        assert (out - expected)[:, :3].abs().max() < 5e-3


def test_every_group_begins_a_tile():
    ids = torch.tensor([[2, 0, 2, 2, 0, 3, 2]])
    found = order(ids, 4, 2, 12)
    assert found.token[found.filled].tolist() == [1, 4, 0, 2, 3, 6, 5]
    assert found.filled[0].tolist() == [True] * 6 + [True, False] + [False] * 4
    assert found.group.tolist() == [[0, 2, 2, 3, 4, 4]]
    assert found.token.gather(1, found.place).tolist() == [list(range(7))]
    assert slots_of(parse("kmeans(queries=3, keys=5)"), Layout(40)) % 16 == 0


def test_centres_are_kept_from_step_to_step_and_not_from_run_to_run():
    layout, memory = Layout(60), Memory()
    q, k, _ = qkv(layout, 2, dim=4)
    pattern = parse("kmeans(queries=4, keys=6, start=3, step=1)")
    first = pattern.cluster(q, k, layout)

    def at(step, run="a", key="m", q=q):
        memory.begin(run, step, 4)
        with placed(Place(memory, key)):
            return pattern.cluster(q, k, layout)

    assert torch.equal(at(0).queries, first.queries)
    turned = q.transpose(1, 2)
    centres = k_means(turned, first_centres(turned, 4), 3, None).centres
    assert torch.equal(at(1).queries, k_means(turned, centres, 1, None).ids)
    assert torch.equal(at(2, key="other").queries, first.queries)
    assert torch.equal(at(0, run="b").queries, first.queries)
    # A cluster that loses its tokens keeps its place; padding moves nothing.
    far = k_means(turned, centres + torch.tensor([0.0, 0.0, 0.0, 1e3])[:, None], 1, None)
    assert torch.equal(far.centres[:, :, 3], centres[:, :, 3] + 1e3) and (far.sizes[:, :, 3] == 0).all()
    valid = torch.ones(1, 60, dtype=torch.bool)
    valid[0, 20:] = False
    moved = turned.clone()
    moved[:, :, 20:] = 7.0
    a, b = (k_means(x, centres, 2, valid).centres for x in (turned, moved))
    assert torch.equal(a, b)


def test_second_derivatives_are_those_of_the_mask():
    layout = Layout((4, 6), 1)
    q, k, v = qkv(layout, 2, dim=4, grad=True)
    found = []
    for backend in ("reference", "ordered"):
        out = attention(q, k, v, TEXTS[0], layout, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kmeans(queries=0)", "queries=0 must be one whole number of at least 1$"),
        ("kmeans(keys=2x2)", "must be one whole number"),
        ("kmeans(p=0)", "p=0 must be a share of the attention"),
        ("kmeans(floor=1.5)", "floor=1.5 must be a share of the clusters, from 0 to 1"),
        ("kmeans(start=0)", "start=0 must be"),
        ("kmeans(queries=65)", "queries=65 clusters are more than the 64 tokens of grid"),
        ("lsh(planes=0)", "planes=0 must be"),
        ("lsh(planes=31)", "planes=31 must be at most 30"),
        ("lsh(block=0)", "block=0 must be"),
        ("lsh(samples=-1)", "samples=-1 must be"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text).check((8, 8))


def test_dense_where_everything_is_listed():
    layout = Layout((5, 5), 2)
    q, k, v = qkv(layout, 2, dim=4)
    dense = attention(q, k, v, "dense", layout)
    out = attention(q, k, v, "kmeans(queries=3, keys=4, p=1.0, floor=1.0, start=2)", layout, backend="ordered")
    assert (out - dense).abs().max() < 1e-10
    assert parse("lsh(block=25, samples=0)").covers((5, 5))
    assert isinstance(Call(parse("lsh"), layout, 1.0).pattern, hashing.Lsh)
