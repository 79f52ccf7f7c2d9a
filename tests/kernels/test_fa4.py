"""FlashAttention-4 without its kernels: what a plan's lists and words say is the plan's mask; refusals; trials."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_flex_visible import neighborhoods
from tests.support.cases import gradients, qkv
from tests.support.places import ROOT
from visattn import Layout, dense_mask, parse, plan
from visattn.dispatch import load, milliseconds, visited_pairs
from visattn.environment import environment
from visattn.kernels.fa4 import package, trial
from visattn.kernels.fa4.backend import _small, backend
from visattn.kernels.fa4.blocks import Order, blocks, patterns_of, tile_plan, wide
from visattn.kernels.fa4.words import COLUMNS, Bits, Packed, packs
from visattn.problem import Call, Problem, Support

CPU = torch.device("cpu")
CASES, FA4 = (json.loads((ROOT / f"docs/results/{name}.json").read_text())["cases"] for name in ("h200", "h200-fa4"))
# Where both ran.
TABLE = {name: case for name, case in CASES.items() if "forward_ms" in case["fa4"]}


def listed(count, index, columns):
    """Lists of blocks as a matrix: bool [samples, lists, rows, columns]."""
    assert count.dtype == index.dtype == torch.int32 and index.shape[-1] <= columns
    own = torch.arange(index.shape[-1]) < count[..., None]
    seen = torch.zeros(*count.shape, columns + 1, dtype=torch.bool)
    seen = seen.scatter(-1, torch.where(own, index.long(), columns), True)[..., :columns]
    assert torch.equal(seen.sum(-1), count.long()), "each block once"
    return seen


def shown(made, layout, keys, head):
    """The mask of a head as the kernels see it, forward and backward: two bool [queries, keys]."""
    rows, found = made.block_size[0], []
    query_slots = torch.arange(layout.length) if made.queries.slot is None else made.queries.slot
    key_slots = torch.arange(keys) if made.keys.slot is None else made.keys.slot
    tiles = made.forward.mask_block_cnt.shape[2], made.backward.mask_block_cnt.shape[2]
    first = 0 if made.first is None else int(made.first[head])
    words = made.words(query_slots[:, None], key_slots[None], first)
    for lists, columns in ((made.forward, tiles[1]), (made.backward, tiles[0])):
        partial, full = listed(*lists[:2], columns)[0], listed(*lists[2:], columns)[0]
        assert not (partial & full).any()
        here = min(head, len(partial) - 1)
        partial, full = (each[here] if lists is made.forward else each[here].T for each in (partial, full))
        at = query_slots[:, None] // rows, key_slots[None] // COLUMNS
        found.append(full[at] | (partial[at] & words))
        # Slots without a token are in no full block, and no query sees them.
        if made.keys.token is not None:
            empty = torch.ones(len(made.keys.token), dtype=torch.bool)
            empty[key_slots] = False
            assert not full[:, empty.view(-1, COLUMNS).any(1)].any()
            assert not made.words(query_slots[:, None], empty.nonzero()[:, 0][None], first)[
                partial[at[0], empty.nonzero()[:, 0][None] // COLUMNS]
            ].any()
    return found


def check(pattern, layout, rows=128, heads=1):
    made = blocks(pattern, layout, heads, rows, CPU)
    for head, each in enumerate(patterns_of(pattern, heads)):
        expected = dense_mask(each, layout)
        for seen in shown(made, layout, expected.shape[1], head):
            assert torch.equal(seen, expected)
    return made


@settings(max_examples=10, deadline=None)
@given(neighborhoods(), st.sampled_from([128, 256]))
def test_lists_and_intervals_of_neighborhoods_are_their_mask(case, rows):
    text, layout = case
    made = check(parse(text), layout, rows)
    assert isinstance(made.words, Packed) and packs(parse(text), layout)


PATTERNS = [
    ("dense", Layout((7, 40))),
    ("na(window=9x9,stride=4x4)", Layout((20, 21), prefix=3, suffix=77)),
    ("na(window=3x5x5,dilation=1x2x1)", Layout((4, 12, 13), suffix=5)),
    ("na(window=5,causal=true)", Layout(300)),
    ("na(window=7x7,circular=0x1)", Layout((20, 24), 1)),
    ("halo(block=7x7,halo=3)", Layout((21, 28))),
    ("clear(radius=5,pool=4)", Layout((16, 13), suffix=33)),
    ("radial(decay=0.5,block=64)", Layout((4, 12, 8), suffix=6)),
    ("radial(decay=0.5,block=128)", Layout((4, 8, 8))),
    ("na(window=9x9)", Layout((18, 20), 1, 0, Layout((9, 10), 0, 77))),
    ("clear(radius=6,pool=4)", Layout((20, 15), 0, 33, Layout((10, 15), 5))),
]


@pytest.mark.parametrize(("text", "layout", "rows"), [(*case, (128, 256)[i % 2]) for i, case in enumerate(PATTERNS)])
def test_lists_and_words_of_every_kind_are_its_mask(text, layout, rows):
    check(parse(text), layout, rows)


HEADS = [
    "perhead(heads={0: na(window=11x11), 2: na(window=5x5)}, rest=halo(block=8x8,halo=3))",
    "perhead(heads={1: clear(radius=5)}, rest=na(window=9x9))",
    "perhead(heads={1: dense}, rest=na(window=9x9))",
]


@pytest.mark.parametrize("text", HEADS)
def test_lists_by_head_are_the_masks_of_heads(text):
    made = check(parse(text), Layout((12, 15), 3, 40), heads=3)
    assert made.first is not None and len(made.first) == 3 and made.forward.full_block_cnt.shape[1] == 3
    assert isinstance(made.words, Bits) == ("clear" in text)


def test_tile_order_that_is_the_tokens_own_moves_nothing():
    assert blocks(parse("radial(decay=0.5)"), Layout((4, 16, 8)), 1, 128, CPU).queries.token is None
    assert blocks(parse("na(window=9)"), Layout(256), 1, 128, CPU).keys.slot is None
    assert blocks(parse("na(window=9)"), Layout(255), 1, 128, CPU).keys.slot is not None


@pytest.mark.parametrize("dim", [8, 5])
def test_moves_are_gathers_of_any_memory(dim):
    token = torch.tensor([3, 0, 0, 2, 1])
    order = Order(token, torch.tensor([1, 4, 3, 0]))
    for x in (
        torch.randn(2, 4, 3, dim),
        torch.randn(2, 3, 4, dim).transpose(1, 2),
        torch.randn(2, 4, 3, dim + 3)[..., :dim],
    ):
        x = x.detach().requires_grad_()
        assert torch.equal(order.into(x), x[:, token]) and torch.equal(order.back(order.into(x)), x)
        (grad,) = torch.autograd.grad((order.back(order.into(x)) * 2).sum(), x)
        assert torch.equal(grad, torch.full_like(x, 2))
    assert wide(torch.empty(1, 2, 8, dtype=torch.bfloat16)).shape == (1, 2, 1)
    assert wide(torch.empty(1, 2, 9, dtype=torch.bfloat16)[..., 1:]).dtype == torch.bfloat16


def double(honest=True, calls=None):
    """flash-attn-4 in plain torch: the lists and the mask function of a call as a dense mask, or silently none."""

    def attend(q, k, v, softmax_scale, return_lse, block_sparse_tensors=None, mask_mod=None, aux_tensors=None, **given):
        assert return_lse and softmax_scale > 0
        if calls is not None:
            calls.append(given | {"lists": block_sparse_tensors})
        mask = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool)
        if block_sparse_tensors is not None and honest:
            assert given["pack_gqa"] is False and all(t.dtype == torch.int32 for t in aux_tensors)
            rows, columns = block_sparse_tensors.block_size
            assert q.shape[1] % rows == k.shape[1] % columns == 0
            i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
            number = (q.shape[1] // rows, k.shape[1] // columns)
            lists, turned = block_sparse_tensors, given["block_sparse_tensors_bwd"]
            partial, full = (listed(*lists[at : at + 2], number[1]) for at in (0, 2))
            if q.requires_grad:
                for at, seen in ((0, partial), (2, full)):
                    assert torch.equal(seen, listed(*turned[at : at + 2], number[0]).mT)
            partial, full = (each[:, :, i // rows, j // columns] for each in (partial, full))
            mask = full | (partial & torch.stack([mask_mod(head, i, j) for head in range(q.shape[2])]))
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
        logits = logits.masked_fill(~mask, -torch.inf)
        some = mask.any(-1)[..., None]
        weights = logits.masked_fill(~some, 0.0).softmax(-1) * some
        lse = logits.masked_fill(~some, 0.0).logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", weights, v), lse

    class Lists(tuple):
        def __new__(cls, *lists, block_size):
            made = super().__new__(cls, lists)
            made.block_size = block_size
            return made

    return package.Package(attend, Lists)


SMALL = Layout((12, 13), suffix=5)


@pytest.fixture
def doubled(monkeypatch, tmp_path):
    """The backend on a CPU with a double of the package."""

    def use(honest=True, calls=None):
        monkeypatch.setattr(package, "load", lambda: (double(honest, calls), ""))

    def mod(made):
        return lambda head, i, j: made.words(i, j, 0 if made.first is None else int(made.first[head]))

    monkeypatch.setenv("VISATTN_CACHE", str(tmp_path))
    monkeypatch.setattr("visattn.kernels.fa4.backend._mod", mod)
    monkeypatch.setattr(package, "version", lambda: "4.0.0b36")
    monkeypatch.setattr(trial, "_TRIED", {})
    small = {
        form: ("dense", Layout(70)) if form == "dense" else (text, SMALL) for form, (text, _) in trial.SMALL.items()
    }
    monkeypatch.setattr(
        trial, "SMALL", {**small, "2 axes": ("na(window=5x5)", SMALL), "bits": ("clear(radius=3)", SMALL)}
    )
    use()
    return use


CALLS = [
    ("na(window=9x9)", Layout((14, 13), 3, 40), 0.3),
    ("clear(radius=5)", Layout((14, 13), 0, 7, Layout((7, 13))), -0.3),
    ("perhead(heads={1: dense}, rest=na(window=9x9))", Layout((14, 13)), 0.3),
    ("dense", Layout(70), 0.3),
    ("na(window=5)", Layout(256), 0.0),
    ("topk(keep=2,block=8x16)", Layout((24, 32), 3, 140), 0.3),
    ("topp(p=0.6,block=128,share=2)", Layout((16, 32)), 0.3),
]


@pytest.mark.parametrize(("text", "layout", "scale"), CALLS)
def test_calls_are_the_references_forward_and_backward(doubled, monkeypatch, text, layout, scale):
    monkeypatch.setattr(trial, "_try", lambda *_: "")
    call = Call(parse(text), layout, scale, lse=True)
    inputs = qkv(layout, heads=4, kv_heads=2, batch=2, dim=8, dtype=torch.float32, grad=True)
    ours, theirs = (load(name).run(*inputs, call) for name in ("fa4", "heads" if "perhead" in text else "reference"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    # Slots that no token fills must not leak into the gradients of keys and values.
    found = (gradients(torch.cat([out, lse[..., None]], 3), inputs) for out, lse in (ours, theirs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_lists_that_are_ignored_are_found_by_a_trial_and_another_backend_runs(doubled, monkeypatch):
    doubled(honest=False)
    layout = Layout((12, 13))
    call = Call(parse("na(window=5x5)"), layout, 0.3)
    q, k, v = qkv(layout, dtype=torch.float32, dim=8)
    with pytest.warns(UserWarning, match="FlashAttention-4 gets wrong here: its output is off by"):
        out, _ = backend.run(q, k, v, call)
    torch.testing.assert_close(out, load("reference").run(q, k, v, call)[0])
    monkeypatch.setattr("visattn.kernels.fa4.backend.DTYPES", (torch.float32,))
    said = backend.supports(problem("na(window=5x5)", dtype=torch.float32, head_dim=8))
    assert not said.ok and "off by" in said.reason
    assert backend.supports(problem("na(window=5x5)", dtype=torch.float32, head_dim=64)).ok


def test_each_kernel_is_tried_once_and_its_time_remembered(doubled):
    calls, layout = [], Layout((12, 13))
    doubled(calls=calls)
    assert backend.compiled() == ""
    for text in ("na(window=5x5)", "na(window=7x7)", "halo(block=4x4,halo=1)"):
        backend.run(*qkv(layout, dtype=torch.float32, dim=8), Call(parse(text), layout, 0.3))
    assert len(calls) == 4, "one trial, three calls"
    backend.run(*qkv(layout, dtype=torch.float32, dim=8, batch=2), Call(parse("clear(radius=4)"), layout, 0.3))
    assert len(calls) == 6 and backend.compiled().startswith("2 kernels took ")
    assert all("forward, " in name for name in package.compiled())
    assert "2 kernels took" in environment()["backends"]["fa4"]["compiled"]


@pytest.mark.parametrize("form", ["2 axes", "chosen"])
def test_gradients_are_tried_below_autograd_and_without_it_too(doubled, monkeypatch, form):
    monkeypatch.setitem(trial.SMALL, "chosen", ("topk(keep=2,block=8x16)", Layout((16, 32), suffix=5)))
    kernel = trial.Kernel(form, False, torch.float32, 8, 2, True, True, grad=True)
    with torch.inference_mode(), torch._C._AutoDispatchBelowAutograd():
        assert trial.wrong(kernel, CPU, _small) == ""
    doubled(honest=False)
    assert "off by" in trial.wrong(kernel._replace(samples=False), CPU, _small)


def problem(text, grid=(64, 64), **given):
    made = Problem(parse(text), Layout(grid), 1, 4, 4, 64, torch.bfloat16, "cuda")
    return dataclasses.replace(made, **given)


REFUSALS = [
    (
        "topk(keep=0.2,block=8x8)",
        {},
        "and 128 keys, and topk chooses blocks of 64 queries",
    ),
    ("topk(keep=0.2,block=8x16)", {"layout": Layout((60, 64))}, "at the border of grid (60, 64) are short"),
    ("topk(keep=0.2,block=8x16,rest=mean)", {}, "nor add pooled keys"),
    ("routing(regions=4x4,topk=2)", {}, "routing computes its lists from q and k"),
    ("linear", {}, "linear is not a list of key tiles"),
    ("perhead(heads={0: topk(keep=0.2,block=8x8)})", {}, "topk computes its lists from q and k"),
    ("na(window=5x5)", {"device": "cpu"}, "it runs on cuda, not on cpu"),
    ("na(window=5x5)", {"dtype": torch.float32}, "it computes in bfloat16 and float16, not in torch.float32"),
    ("na(window=5x5)", {"head_dim": 256}, "its blocks take 8 to 128 channels per head in steps of 8, not 256"),
    ("na(window=5x5)", {"head_dim": 36}, "not 36"),
    ("na(window=5x5)", {"head_dim": 80, "grad": True}, "wrong for head dims that are no multiple of 32, like 80"),
    ("na(window=5x5)", {"key_mask": True}, "a key mask would put every block through its mask function"),
    ("na(window=5x5)", {"rpb": True}, "relative position bias"),
    ("perhead(heads={0: na(window=5x5,dilation=2)}, rest=na(window=5x5))", {}, "cannot be one launch"),
]


@pytest.mark.parametrize(("text", "given", "reason"), REFUSALS)
def test_refuses_with_the_reason(monkeypatch, text, given, reason):
    monkeypatch.setattr(package, "version", lambda: "4.0.0b36")
    said = backend.supports(problem(text, **given))
    assert not said.ok and reason in said.reason


def test_without_the_package_nothing_is_planned_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(package, "version", lambda: None)
    monkeypatch.setattr("visattn.kernels.fa4.backend.plans_of", None)
    missing = Support(False, "flash-attn-4 is not installed (pip install visattn[fa4])")
    assert backend.supports(problem("na(window=5x5)")) == backend.available() == missing


def test_deterministic_algorithms_have_no_backward_along_lists(monkeypatch):
    monkeypatch.setattr(package, "version", lambda: "4.0.0b36")
    asked = problem("na(window=5x5)", grad=True, strict=True)
    assert "use_deterministic_algorithms" in backend.supports(asked).reason
    assert backend.supports(problem("na(window=5x5)", strict=True)).ok
    assert backend.supports(problem("dense", grad=True, strict=True)).ok


def test_costs_count_the_moves_and_partial_blocks(monkeypatch):
    monkeypatch.setattr(package, "version", lambda: "4.0.0b36")
    big = {"heads": 24, "kv_heads": 24, "head_dim": 128, "mode": "captured"}
    flat = problem("radial(decay=0.5)", (16, 64, 64), **big)
    assert backend.cost(flat) == pytest.approx(visited_pairs(flat, tile_plan(flat.pattern, flat.layout, 128)))
    grid, text = (256, 256), "na(window=80x80{})"
    strided = problem(text.format(",stride=16x16"), grid, **big)
    tiles = tile_plan(strided.pattern, strided.layout, 128)
    moves = milliseconds(strided, backend.cost(strided)) - milliseconds(strided, visited_pairs(strided, tiles))
    whole, launch = (FA4["flux-s16"][name]["forward_ms"] for name in ("fa4", "fa4 alone"))
    assert moves == pytest.approx(whole - launch, rel=0.1), "four copies of 403 MB"
    assert backend.cost(problem(text.format(""), grid, **big)) > 1.2 * backend.cost(strided)
    dense = problem("dense", grid, **big)
    assert backend.cost(dense) < load("sdpa").cost(dense)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("grad", [False, True])
def test_auto_takes_who_was_measured_faster(monkeypatch, name, grad):
    monkeypatch.setattr(package, "version", lambda: "4.0.0b36")
    case = TABLE[name]
    ways = ("forward_ms", "backward_ms") if grad else ("forward_ms",)
    measured = {who: sum(case[who][way] for way in ways) for who in ("fa4", "triton")}
    grid = tuple(map(int, case["layout"].split("x")))
    posed = problem(case["pattern"], grid, heads=24, kv_heads=24, head_dim=128, mode="captured", grad=grad)
    costs = {who: load(who).cost(posed) for who in measured}
    apart = abs(measured["fa4"] / measured["triton"] - 1)
    # What is as fast within 4 % may go to either.
    assert apart < 0.04 or min(costs, key=costs.__getitem__) == min(measured, key=measured.__getitem__)


def test_boxes_follow_the_stride_and_heads_share_those_of_the_first_window():
    strided = parse("na(window=6x8x48,stride=1x8x16)")
    layout = Layout((6, 32, 64))
    assert (
        tile_plan(strided, layout, 128).full_share
        == 1
        > plan(strided, layout, strided.tile(layout.grid, 128)).full_share
    )
    text = "perhead(heads={0: dense, 1: na(window=4x16,stride=4x16)}, rest=na(window=3x3))"
    made = check(parse(text), Layout((8, 32)), heads=3)
    assert made.first is not None and made.forward.full_block_cnt[0].tolist() == [[2, 2], [0, 0], [0, 0]]
