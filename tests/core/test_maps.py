"""Maps of attention against explicit weights S x S in float64: every identity that stands for a map."""

import json

import numpy as np
import pytest
import torch

import visattn
from visattn import Layout, dense_mask, maps, parse
from visattn.maps.look import read_by_head
from visattn.maps.overview import of_heads
from visattn.maps.summary import hop_windows
from visattn.patterns import routed_mask
from visattn.recorded import Recorded
from visattn.tuning.candidates import checked
from visattn.tuning.places import read_lines

SHAPES = {
    "plain": (Layout((5, 7)), 3, 3, False),
    "text and grouped heads": (Layout((4, 6), 2, 3), 4, 2, False),
    "hidden keys": (Layout((3, 4), 3), 2, 1, True),
    "line": (Layout((13,), 1), 2, 2, False),
    "video": (Layout((3, 4, 5), 0, 2), 2, 2, True),
}


def made(name, seed=0, site="a"):
    layout, heads, key_heads, masked = SHAPES[name]
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, layout.length, h, 6, generator=draw, dtype=torch.float64) for h in (heads, key_heads, key_heads)
    )
    mask = None
    if masked:
        mask = torch.rand(2, layout.length, generator=draw) < 0.7
        mask[:, -1] = True
    return Recorded(site, None, 0, q, k, v, layout, 0.7, mask)


def weights(call):
    """[B, H, S, S]."""
    keys = call.k.repeat_interleave(call.q.shape[2] // call.k.shape[2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", call.q, keys) * call.scale
    if call.key_mask is not None:
        logits = logits.masked_fill(~call.key_mask[:, None, None], -torch.inf)
    return logits.softmax(-1)


def same(found, wanted, most=1e-12):
    torch.testing.assert_close(found, wanted, rtol=most, atol=most)


@pytest.mark.parametrize("name", SHAPES)
def test_locality_and_entropy_are_those_of_the_explicit_map(name):
    call = made(name)
    layout, a, found = call.layout, weights(call), maps.spread(call)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    index = np.indices(layout.grid).reshape(layout.dims, -1).T
    where = torch.tensor(index - (np.array(layout.grid) - 1) / 2) / np.sqrt(sum((n - 1) ** 2 for n in layout.grid))
    on_grid = a[..., inner]
    same(found.mass, on_grid.sum(-1).transpose(1, 2))
    same(found.mean, torch.einsum("bhqk,kd->bqhd", on_grid, where))
    apart = torch.cdist(where, where).square()
    squared = (on_grid[:, :, inner] * apart).sum(-1).transpose(1, 2)
    same(found.squared, squared)
    same(found.distance, (squared / found.mass[:, inner]).sqrt(), 1e-7)
    moved = torch.einsum("bhqk,kd->bqhd", on_grid[:, :, inner], where) / found.mass[:, inner, :, None]
    same(found.offset, moved - where[:, None])
    count = torch.tensor([[[layout.length]]]) if call.key_mask is None else call.key_mask.sum(1)[:, None, None]
    same(found.entropy, torch.special.entr(a).sum(-1).transpose(1, 2) / count.double().log())


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_read_is_the_transposed_map(name):
    call = made(name)
    a = weights(call)
    draw = torch.Generator().manual_seed(3)
    g = torch.randn(2, 8, call.layout.length, generator=draw, dtype=torch.float64)
    same(maps.received(call, g), torch.einsum("bhqk,brq->brk", a, g))
    each = torch.randn(2, 1, a.shape[1], call.layout.length, generator=draw, dtype=torch.float64)
    same(maps.received(call, each), torch.einsum("bhqk,brhq->brk", a, each))
    with pytest.raises(ValueError, match=r"weights \[2, 8, 3\] must be \[B, R, S\]"):
        maps.received(call, g[..., :3])


@pytest.mark.parametrize(
    "text",
    [
        "na(window=3x3)",
        "na(window=1)",
        "clear(radius=2)",
        "topk(keep=0.4, block=2x2, rest=mean)",
        "topk(keep=0.4, block=2x2, share=2, every=3)",
        "routing(regions=2, topk=1)",
        "dense",
    ],
)
def test_what_is_caught_is_that_of_the_map_on_what_is_listed(text):
    call = made("text and grouped heads")
    pattern = parse(text)
    if pattern.name in ("topk", "routing"):
        own = parse(text.replace("rest=mean", "rest=drop").replace(", every=3", ""))
        seen = routed_mask(own, call.layout, call.q, call.k, None, call.scale)
        seen = seen if seen.ndim == 4 else seen[:, None]
    else:
        seen = dense_mask(pattern, call.layout)
    wanted = (weights(call) * seen).sum(-1).transpose(1, 2)
    same(maps.caught(call, text), wanted)
    same(maps.caught(call, text, maps.spread(call).lse), wanted)


def test_what_is_caught_of_each_head_and_of_hidden_keys():
    call = made("text and grouped heads")
    parts = [maps.caught(call, text) for text in ("na(window=3x3)", "topk(keep=0.4, block=2x2)")]
    found = maps.caught(call, "perhead(heads={0: na(window=3x3)}, rest=topk(keep=0.4, block=2x2))")
    same(found, torch.cat([parts[0][..., :1], parts[1][..., 1:]], -1))
    call = made("hidden keys")
    same(maps.caught(call, "na(window=3x3)"), (weights(call) * dense_mask("na(window=3x3)", call.layout)).sum(-1).mT)


@pytest.mark.parametrize(
    "text", ["linear", "agent(agents=2)", "sigmoid(sparse=na(window=3x3))", "clear(radius=2, pool=2)"]
)
def test_patterns_that_select_no_keys_keep_no_mass(text):
    with pytest.raises(ValueError, match=r"(catches no share|appends pooled keys)"):
        maps.caught(made("text and grouped heads"), text)


@pytest.mark.parametrize("name", ["text and grouped heads", "hidden keys"])
def test_rollout_is_the_product_of_all_maps(name):
    calls = [made(name, seed) for seed in range(3)]
    product = torch.eye(calls[0].layout.length, dtype=torch.float64).expand(2, -1, -1)
    for call in calls:
        product = (torch.eye(call.layout.length) + weights(call).mean(1)) / 2 @ product
    same(maps.rollout(calls, [4, 0]), product[:, [4, 0]])
    same(maps.rollout(calls), product[:, :1])
    plain = [made("plain")]
    same(maps.rollout(plain)[:, 0], (torch.eye(35) + weights(plain[0]).mean(1)).mean(1) / 2)
    with pytest.raises(ValueError, match="needs one sequence in all layers"):
        maps.rollout([*calls, *plain])
    with pytest.raises(ValueError, match=r"rows=\[99\] must be whole numbers"):
        maps.rollout(calls, [99])
    with pytest.raises(ValueError, match="at least one"):
        maps.rollout([])


@pytest.mark.parametrize("name", ["plain", "text and grouped heads", "video", "line"])
def test_offsets_are_those_of_all_queries(name):
    call = made(name)
    layout, a = call.layout, weights(call)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    a = a[:, :, inner, inner].mean(0).numpy()
    index = np.indices(layout.grid).reshape(layout.dims, -1).T
    wanted = np.zeros((a.shape[0], *(2 * n - 1 for n in layout.grid)))
    for i, query in enumerate(index):
        for j, key in enumerate(index):
            wanted[(slice(None), *(key - query + np.array(layout.grid) - 1))] += a[:, i, j] / len(index)
    same(maps.offsets(call), torch.from_numpy(wanted))
    assert maps.offsets(call, 4).shape == wanted.shape
    with pytest.raises(ValueError, match="samples=0"):
        maps.offsets(call, 0)


@pytest.mark.parametrize("name", ["text and grouped heads", "hidden keys"])
def test_who_is_read_head_by_head(name):
    call = made(name)
    inner = slice(call.layout.prefix, call.layout.prefix + call.layout.tokens)
    same(read_by_head(call), weights(call)[0, :, inner].mean(1))


def test_rows_are_dense_sparse_and_their_difference():
    call = made("text and grouped heads")
    found = maps.rows(call, [5, 0], "na(window=3x3)")
    same(found.dense, weights(call)[:, :, [5, 0]])
    seen = dense_mask("na(window=3x3)", call.layout)[[5, 0]]
    masked = weights(call)[:, :, [5, 0]] * seen
    same(found.sparse, masked / masked.sum(-1, keepdim=True))
    same(found.difference, found.sparse - found.dense)
    assert maps.rows(call, [1]).difference is None


def test_the_overview_says_which_heads_bear_which_pattern():
    layout = Layout((4, 4))
    draw = torch.Generator().manual_seed(0)
    # Head 0 looks at itself, head 1 at everything.
    basis = 40 * torch.eye(16, dtype=torch.float64)[None, :, None]
    q = torch.cat([basis, torch.zeros_like(basis)], 2)
    v = torch.randn(1, 16, 2, 16, generator=draw, dtype=torch.float64)
    calls = [Recorded(f"layer.{i}", None, 0, q, q, v, layout, 0.1, None) for i in range(2)]
    found = maps.overview(calls, ["na(window=3x3)", "na(window=1x1)", "topk(keep=0.8, block=1)"])
    assert list(found.patterns) == ["na(window=1x1)", "na(window=3x3)", "topk(keep=0.8, block=1)"]
    assert found.table(0.9)["layer.0"] == ["na(window=1x1)", "dense"]
    assert found.table(0.5)["layer.1"] == ["na(window=1x1)", "na(window=3x3)"]
    site = found.sites[0]
    assert site.distance[0] < 0.02 and site.entropy[0] < 0.02 and abs(float(site.entropy[1]) - 1) < 1e-9
    same(site.caught["na(window=1x1)"][1], torch.tensor(1 / 16, dtype=torch.float64))
    assert site.least["na(window=3x3)"][1] <= site.caught["na(window=3x3)"][1]
    assert set(site.hops) == set(hop_windows((4, 4))) == {0, 1}
    torch.testing.assert_close(found.similarity[0::2, 0::2], torch.ones(2, 2))
    assert found.similarity[1].max() < 1e-3
    assert not maps.overview(calls, hops=False).sites[0].hops
    schedule = found.schedule()
    assert schedule == dict.fromkeys(["layer.0", "layer.1"], "perhead(heads={0: na(window=1x1), 1: dense}, rest=dense)")
    names, only = read_lines(found.candidates())
    assert set(checked(names, (4, 4))) == {"dense", *names} and set(found.patterns) < set(names)
    # What is for heads is for the layers whose heads those are.
    assert only == {name: {"layer.0", "layer.1"} for name in names if name.startswith("perhead")} != {}
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["caught"]["na(window=1x1)"][1] == 0.0625
    with pytest.raises(ValueError, match="mass=0 must be"):
        found.table(0)
    with pytest.raises(ValueError, match="no call to look at"):
        maps.overview([])
    with pytest.raises(ValueError, match="catches no share"):
        maps.overview(calls, ["linear"])


def test_neighbouring_heads_are_ranges():
    assert of_heads(["dense"] * 3) == "dense"
    text = of_heads(["dense", "dense", "na(window=3x3)", "dense"])
    assert parse(text).of_heads(4) == [parse(t) for t in ("dense", "dense", "na(window=3x3)", "dense")]


def test_scores_of_saliency_maps():
    plain, masked = torch.tensor([0.8, 0.5, 0.4]), torch.tensor([0.4, 0.6, 0.4])
    assert abs(maps.average_drop(plain, masked) - 0.5 / 3) < 1e-9
    assert abs(maps.confidence_gain(plain, masked) - 1 / 3) < 1e-9
    best = maps.top_share(torch.tensor([[[0.0, 1.0], [3.0, 4.0]]]), 0.5)
    same(best, torch.tensor([[[0.0, 0.0], [0.75, 1.0]]]))
    with pytest.raises(ValueError, match="share=0"):
        maps.top_share(best, 0)
    with pytest.raises(ValueError, match="probabilities"):
        maps.average_drop(plain, masked[:2])


def test_maps_need_no_map():
    """At 16,384 tokens one explicit map of a head would be 1 GiB: this runs in a part of that."""
    layout = Layout((128, 128))
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, layout.length, 1, 4, generator=draw)
    call = Recorded("a", None, 0, q, q, q, layout, 0.5, None)
    shapes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            shapes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        # The first queries alone: dense attention of all would take long here.
        maps.offsets(call, 8)
        maps.rows(call, [3])
        maps.caught(call, "na(window=5x5)", torch.zeros(1, layout.length, 1))
    assert max(shapes) < layout.length**2 / 8


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_gpu_gives_the_same(name):
    here = [made(name, seed, f"layer.{seed}") for seed in range(2)]
    there = [
        call._replace(
            q=call.q.float().cuda(),
            k=call.k.float().cuda(),
            v=call.v.float().cuda(),
            key_mask=None if call.key_mask is None else call.key_mask.cuda(),
        )
        for call in here
    ]
    patterns = ["na(window=3)", "topk(keep=0.5, block=2)"]
    one, two = maps.overview(here, patterns), maps.overview(there, patterns)
    for a, b in zip(one.sites, two.sites, strict=True):
        for field in ("mass", "distance", "offset", "entropy"):
            torch.testing.assert_close(getattr(b, field).double(), getattr(a, field), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(b.caught["na(window=3)"].double(), a.caught["na(window=3)"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two.similarity.double(), one.similarity.double(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(maps.rollout(there).double().cpu(), maps.rollout(here), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(maps.offsets(there[0]).double().cpu(), maps.offsets(here[0]), rtol=1e-3, atol=1e-4)


def test_public_names():
    assert visattn.maps is maps and all(hasattr(maps, name) for name in maps.__all__)
