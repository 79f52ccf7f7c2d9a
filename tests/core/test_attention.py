"""attention(): what a user gets, what a user is told, and which backend runs."""

import importlib
import re
import threading

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import visattn
from tests.support.cases import qkv
from visattn.dispatch import BACKENDS, Backend, cheapest, load, overhead
from visattn.kernels.xformers import block_of, from_blocks, to_blocks
from visattn.layout import Layout
from visattn.patterns import parse
from visattn.problem import Problem, Support

LAYOUT = Layout((6, 7), 2)


def fails(text, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(text)):
        visattn.attention(*args, **kwargs)


def problem(text="na(window=3)", layout=LAYOUT, dtype=torch.float32, device="cpu", dim=16, **more):
    return Problem(parse(text), layout, 1, 2, 2, dim, dtype, device, **more)


def test_a_plain_sdpa_user_finds_the_same_numbers():
    q, k, v = qkv(LAYOUT, dtype=torch.float32, dim=16)
    key_mask = torch.rand(1, LAYOUT.length) < 0.8
    mask = visattn.dense_mask("na(window=3)", LAYOUT) & key_mask[:, None, None]
    plain = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)
    out = visattn.attention(q, k, v, "na(window=3)", LAYOUT, key_mask=key_mask)
    assert (out - plain).abs().max() < 2e-6
    dense = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert torch.equal(visattn.attention(q, k, v, "dense", LAYOUT), dense)


def test_a_mask_is_never_ignored():
    q, k, v = qkv(LAYOUT, dtype=torch.float32, dim=16)
    key_mask = torch.ones(1, LAYOUT.length, dtype=torch.bool)
    key_mask[0, 20] = False
    changed = v.clone()
    changed[0, 20] += 100
    for name in ("auto", *BACKENDS.own):
        if name != "auto" and not load(name).available().ok:
            continue
        if name != "auto" and not load(name).supports(problem(key_mask=True)).ok:
            continue
        if name == "flex":
            continue  # compiles for seconds: test_backends_shared.py
        one, two = (
            visattn.attention(q, k, t, "na(window=3)", LAYOUT, key_mask=key_mask, backend=name) for t in (v, changed)
        )
        assert torch.equal(one, two), name


def test_shapes_dtypes_and_devices_that_do_not_fit():
    q, k, v = qkv(LAYOUT)
    fails("q [44, 2, 10], k [1, 44, 2, 10], v [1, 44, 2, 10] must all be", q[0], k, v, "dense", LAYOUT)
    fails("must agree in batch, tokens and head_dim", q, k[:, :-1], v[:, :-1], "dense", LAYOUT)
    fails("must agree in batch, tokens and head_dim", q, k[..., :-1], v[..., :-1], "dense", LAYOUT)
    fails("q has 2 heads, not a multiple of the 3 heads of k and v", q, *qkv(LAYOUT, 3)[1:], "dense", LAYOUT)
    fails("q torch.float64, k torch.float32 and v torch.float64 must be one", q, k.float(), v, "dense", LAYOUT)
    fails("must be one floating-point dtype", q.int(), k.int(), v.int(), "dense", LAYOUT)
    fails("q on cpu, k on meta and v on cpu must be on one device", q, k.to("meta"), v, "dense", LAYOUT)


def test_a_grid_that_does_not_match_says_what_would():
    q, k, v = qkv(Layout((8, 8)))
    fails("grid 8x7 has 56 tokens but q has 64", q, k, v, "dense", Layout((8, 7)))
    fails("prefix 1 + grid 8x8 has 65 tokens but q has 64", q, k, v, "dense", Layout((8, 8), 1))
    fails("pass layout=Layout((8, 8))", q, k, v, "dense", Layout((9, 9)))


def test_masks_and_biases_that_do_not_fit():
    q, k, v = qkv(LAYOUT)
    mask = torch.ones(1, LAYOUT.length, dtype=torch.bool)
    fails(
        "key_mask is torch.float32 [1, 44] but must be torch.bool [1, 44]",
        q,
        k,
        v,
        "dense",
        LAYOUT,
        key_mask=mask.float(),
    )
    fails("key_mask is torch.bool [44] but must be torch.bool [1, 44]", q, k, v, "dense", LAYOUT, key_mask=mask[0])
    fails("key_mask is on meta but q on cpu: move it there", q, k, v, "dense", LAYOUT, key_mask=mask.to("meta"))
    bias = torch.zeros(2, 5, 5, dtype=q.dtype)
    fails("rpb is given but dense has no relative position bias", q, k, v, "dense", LAYOUT, rpb=bias)
    fails(
        "rpb is [2, 5, 4] but na(window=3) with 2 heads takes [2, 5, 5]",
        q,
        k,
        v,
        "na(window=3)",
        LAYOUT,
        rpb=bias[..., 1:],
    )
    fails("pool_weight is given but dense pools no keys", q, k, v, "dense", LAYOUT, pool_weight=bias[0])
    fails("takes [2, 2]", q, k, v, "clear(radius=2, pool=2)", LAYOUT, pool_weight=bias[0])


def test_backends_that_do_not_exist_or_cannot():
    q, k, v = qkv(LAYOUT, grad=True)
    fails(f"unknown backend 'flash'; backends: auto, {', '.join(BACKENDS)}", q, k, v, "dense", LAYOUT, backend="flash")
    fails(
        "backend 'natten' cannot run this call: NATTEN runs na(...) only, not dense; pass backend='auto'"
        if load("natten").available().ok
        else "backend 'natten' cannot run this call: natten is not installed",
        *(q, k, v, "dense", LAYOUT),
        backend="natten",
    )


REFUSALS = [
    ("sdpa", {"rpb": True}, "it adds no relative position bias"),
    ("sdpa", {"layout": Layout((200, 200))}, "its dense mask of 1.6e+09 entries is over 268435456"),
    ("reference", {"layout": Layout((200, 200))}, "its score matrix of 3.2e+09 entries is over 268435456"),
    ("flex", {"text": "routing(regions=2, topk=1)"}, "routing computes its lists from q and k"),
    ("flex", {"device": "mps"}, "it runs on cpu and cuda, not on mps"),
    ("flex", {"dtype": torch.float64}, "it computes in float32, bfloat16 and float16, not in torch.float64"),
    ("flex", {"grad": True}, "FlexAttention has no backward on a CPU"),
    ("flex", {"lse": True}, "FlexAttention returns no log-sum-exp on a CPU"),
    ("flex", {"device": "cuda", "dim": 8}, "its CUDA kernel takes 16 to 256 channels per head, not 8"),
    ("natten", {"text": "halo(block=2, halo=1)"}, "NATTEN runs na(...) only, not halo"),
    ("natten", {"text": "na(window=1x3)"}, "NATTEN takes windows of at least 2, and axis 0 has 1"),
    ("natten", {"key_mask": True}, "NATTEN takes no key mask"),
    ("natten", {"rpb": True}, "NATTEN has no relative position bias"),
    ("natten", {"dtype": torch.float64}, "NATTEN computes in float32, bfloat16 and float16, not in torch.float64"),
    ("natten", {"device": "mps"}, "NATTEN runs on cpu and cuda, not on mps"),
    ("natten", {"grad": True}, "NATTEN has no backward on a CPU"),
    ("natten", {"dim": 12}, "takes head dims that are powers of two, not 12"),
    (
        "natten",
        {"layout": Layout((128, 128))},
        "builds the whole score matrix, and 5.37e+08 entries are over 268435456",
    ),
    (
        "natten",
        {"text": "na(window=-1, causal=true)", "layout": Layout(9)},
        "NATTEN without its CUDA kernels runs no causal window over the whole axis",
    ),
    ("xformers", {}, "xFormers has no operator for cpu"),
    ("xformers", {"device": "cuda", "rpb": True}, "its biases get no gradient that a relative position bias could use"),
    ("xformers", {"device": "cuda", "lse": True}, "its public function returns no log-sum-exp"),
    ("xformers", {"device": "cuda", "key_mask": True}, "rows without any visible key are undefined in its kernels"),
    ("xformers", {"device": "cuda", "dtype": torch.float64}, "it computes in float32, bfloat16 and float16"),
    ("xformers", {"device": "cuda", "dim": 12}, "head_dim 12 is not a multiple of 8"),
    ("xformers", {"device": "cuda", "layout": Layout((100, 100))}, "its bias tensor of 2e+08 entries is over 67108864"),
]


@pytest.mark.parametrize(("name", "call", "text"), REFUSALS)
def test_refusals_say_why(name, call, text):
    support = load(name).supports(problem(**call))
    assert not support.ok
    assert text in support.reason


def test_refusals_of_machines(monkeypatch):
    flex = load("flex")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "FlexAttention on a CPU needs AVX2" in flex.supports(problem()).reason
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "needs a C++ compiler (g++)" in flex.supports(problem()).reason
    monkeypatch.undo()
    with torch._dynamo.config.patch(disable=True):
        assert "torch.compile is switched off" in flex.available().reason
    if not torch.cuda.is_available():
        assert load("xformers").available() == Support(
            False, "xFormers has no operator for a CPU, and there is no CUDA device"
        )


@pytest.mark.parametrize("name", ["natten", "xformers"])
def test_a_package_that_is_missing_or_broken_is_a_refusal(name, monkeypatch):
    module = importlib.import_module(f"visattn.kernels.{name}")
    find = next(f for f in (getattr(module, "_natten", None), getattr(module, "_ops", None)) if f is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find.__wrapped__() == (None, f"{name} is not installed (pip install {name})")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)

    def broken(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert find.__wrapped__() == (None, f"{name} does not import: OSError: undefined symbol")


class Fixed(Backend):
    """A backend with a given verdict."""

    name = "fixed"

    def __init__(self, available, supports, cost):
        self.verdicts = Support(available, "not here"), Support(supports, "cannot"), cost

    def available(self):
        return self.verdicts[0]

    def supports(self, problem):
        return self.verdicts[1]

    def cost(self, problem):
        return self.verdicts[2]

    def run(self, q, k, v, call):
        raise NotImplementedError


def test_auto_takes_the_cheapest_that_is_here_and_able():
    found = {
        "a": Fixed(False, True, 1),
        "b": Fixed(True, False, 2),
        "c": Fixed(True, True, 4),
        "d": Fixed(True, True, 3),
    }
    assert cheapest(problem(), found.values()) is found["d"]
    del found["c"], found["d"]
    found["a"].name, found["b"].name = "a", "b"
    reasons = "no backend can run na(window=3) on 6x7, prefix 2: a: not here; b: cannot"
    with pytest.raises(ValueError, match=re.escape(reasons)):
        cheapest(problem(), found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="costs of a CPU")
def test_auto_prefers_dense_where_sparse_is_slower_and_says_so():
    layout = Layout((12, 12))
    verdict = visattn.explain("na(window=11x11)", layout, torch.zeros(1, layout.length, 2, 16))
    assert verdict.choice == "sdpa"
    assert "of all pairs of tiles" in verdict.reason
    assert re.search(
        r"so \w+ would take an estimated [\d.]+ times as long as dense attention with a mask", str(verdict)
    )
    large = Layout((128, 128))
    sparse = visattn.explain("na(window=9x9)", large, torch.zeros(1, large.length, 4, 64))
    assert sparse.choice == "tiles"
    assert re.search(r"visits [1-9]% of all pairs of tiles, an estimated 0.\d+ of dense SDPA's time", sparse.reason)
    dense = visattn.explain("na(window=-1)", layout, torch.zeros(1, layout.length, 2, 16))
    assert dense.choice == "sdpa" and "so it is dense attention" in dense.reason
    for name in BACKENDS.own:
        assert re.search(rf"\n  (made for other patterns: .*)?\b{name}\b", str(dense))


def test_backends_lists_all_with_a_reason_where_they_are_missing():
    importlib.import_module("visattn.dispatch")
    found = visattn.backends()
    assert list(found) == list(BACKENDS)
    assert found["sdpa"].ok and found["reference"].ok
    assert all(support.ok or support.reason for support in found.values())


def test_an_overhead_counts_less_where_pairs_cost_more():
    assert overhead(problem(dim=16), 1, 1) == 4 * overhead(problem(dim=64), 1, 1) > 0


def test_xformers_cuts_blocked_attention_in_samples():
    assert block_of(problem("na(window=2x3, stride=2x3)", Layout((4, 6)))) == (2, 3)
    for text, layout in [
        ("na(window=2x3, stride=2x3)", Layout((4, 6), 1)),
        ("na(window=2x3, stride=2x3)", Layout((4, 7))),
        ("na(window=2x3, stride=1x3)", Layout((4, 6))),
        ("na(window=2x3, stride=2x3, causal=0x1)", Layout((4, 6))),
    ]:
        assert block_of(problem(text, layout)) is None
    layout, block = Layout((4, 6)), (2, 3)
    q, k, v = qkv(layout, batch=2)
    cut = [to_blocks(t, layout.grid, block) for t in (q, k, v)]
    assert cut[0].shape == (8, 6, 2, 10)
    out = visattn.attention(*cut, "dense", Layout(6))
    truth = visattn.attention(q, k, v, "na(window=2x3, stride=2x3)", layout, backend="reference")
    assert (from_blocks(out, layout.grid, block) - truth).abs().max() < 1e-12


def test_threads_with_different_grids_do_not_disturb_each_other():
    layouts = [Layout((6 + i, 9), i) for i in range(4)]
    given = [qkv(layout, dtype=torch.float32, dim=16, seed=i) for i, layout in enumerate(layouts)]
    truth = [
        visattn.attention(*t, "na(window=3)", lay, backend="reference") for t, lay in zip(given, layouts, strict=True)
    ]
    wrong = []

    def work(i):
        for _ in range(20):
            name = ("auto", "tiles", "sdpa")[_ % 3]
            out = visattn.attention(*given[i], "na(window=3)", layouts[i], backend=name)
            if (out - truth[i]).abs().max() > 5e-6:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
