"""Second branches of hybrid patterns: their launches are started again, each with the addresses of its own call."""

import collections
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from torch.profiler import ProfilerActivity, profile

from tests.support.fake_driver import fake_driver
from visattn import Layout, attention, clear_caches, parse
from visattn.keep import STORE
from visattn.kernels.hybrid import backend as hybrid
from visattn.kernels.triton import again
from visattn.kernels.triton.hybrid import linear
from visattn.problem import Support

LAYOUT = Layout((16, 16), 7)
# Launches of a call, those of the softmax branch among them.
CASES = {
    "sla": ("sla(keep=0.3, block=8x8)", 8),
    "sla, marginal": ("sla(keep=1, marginal=2, block=8x8)", 9),
    "vsa": ("vsa(keep=0.3, block=8x8)", 8),
    "vsa, gate of channels": ("vsa(keep=0.3, gate=channel, block=8x8)", 8),
    "sla2": ("sla2(keep=0.3, block=8x8)", 9),
    "sla2, means": ("sla2(keep=0.3, router=mean, ratio=mass, block=8x8)", 9),
}


def given(text, seed, dtype=torch.bfloat16, heads=2, kv_heads=1, layout=LAYOUT):
    draw, pattern = torch.Generator().manual_seed(seed), parse(text)
    q, k, v = (torch.randn(2, layout.length, n, 64, generator=draw).to(dtype) for n in (heads, kv_heads, kv_heads))
    shapes = pattern.parameter_shapes(heads, 64, layout.grid)
    return q, k, v, {name: torch.randn(shape, generator=draw) / 8 for name, shape in shapes.items()}


def call(text, tensors, layout=LAYOUT, **more):
    q, k, v, parameters = tensors
    with torch.no_grad():
        return attention(q, k, v, text, layout, parameters=parameters, **more)


@pytest.fixture
def driver(monkeypatch):
    """Kernels choose and run second branches, as they do for tensors on a GPU."""
    from visattn.kernels.triton.backend import backend

    clear_caches()
    monkeypatch.setattr("visattn.patterns.dynamic.by_kernels", backend.choose)
    monkeypatch.setattr(hybrid, "on_gpu", lambda q: Support(True))
    # Whatever is faster for so few tokens.
    monkeypatch.setattr(hybrid, "run_like", lambda *given, run=hybrid.run_like: run(*given[:-1], "triton"))
    with fake_driver() as seen:
        yield seen
    clear_caches()


def by_name(launches):
    found = collections.defaultdict(list)
    for kernel, values in launches:
        found[kernel.fn.__name__].append(values)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_calls_are_started_again_with_their_addresses(driver, name, masked):
    text, launches = CASES[name]
    seen, counts = [], []
    for seed in range(3):
        more = {"key_mask": torch.ones(2, LAYOUT.length, dtype=torch.bool)} if masked else {}
        q, k, v, parameters = tensors = given(text, seed)
        out = call(text, tensors, **more)
        seen.append(by_name(driver[-launches:]))
        held = [weakref.ref(t) for t in (q, k, v, out, *parameters.values(), *more.values())]
        counts.append((len(driver.first), len(driver)))
    # Means of keys and values are launches that are alike.
    assert sum(counts[0]) == launches and counts[2] == (counts[0][0], counts[0][1] + 2 * launches)
    (earlier, found), at = seen[1:], LAYOUT.prefix
    means, (select, *_), (scores,) = found["part_means"], found["select"], found["pair_scores"]
    pooled = (q, k, v) if name.startswith("vsa") else (q, k)
    assert [m["x"] for m in means] == [t[:, at:].data_ptr() for t in pooled]
    assert all((m["valid"] != m["tokens"]) == masked for m in means)
    assert (scores["count_q"], select["count_k"]) == (means[0]["counts"], means[1]["counts"])
    assert select["scores"] == scores["scores"] and found["write_lists"][0]["choice"] == select["tiles"]
    assert found["attend"][0]["out"] == out.data_ptr()
    assert [m["tokens"] for m in means] == [m["tokens"] for m in earlier["part_means"]]
    if name.startswith("vsa"):
        (gated,) = found["add_gated"]
        assert (gated["q"], gated["out"]) == (q[:, at:].data_ptr(), out[:, at:].data_ptr())
        assert gated["gate"] == parameters["gate"].data_ptr()
        assert gated["tokens"] == earlier["add_gated"][0]["tokens"]
        assert len({m["rounded"] for m in means} | {m["out"] for m in means}) == 6
    else:
        (states,), (joined,) = found["group_states"], found["join_states"]
        assert states["k"] == k[:, at:].data_ptr() and (states["valid"] != states["k"]) == masked
        assert name == "sla" or not masked or states["valid"] == means[0]["valid"]
        # Values behind the map are a tensor of torch's.
        assert name == "sla, marginal" or states["v"] == v[:, at:].data_ptr()
        assert (joined["q"], joined["out"]) == (q[:, at:].data_ptr(), out[:, at:].data_ptr())
        assert not name.startswith("sla,") or joined["bias"] == parameters["bias"].data_ptr()
    if name.startswith("sla2"):
        (odds,) = found["row_odds"]
        assert (odds["scores"], odds["tiles"]) == (scores["scores"], select["tiles"])
        assert name != "sla2" or (joined["odds"] == odds["odds"] != joined["share"])
    if name == "sla, marginal":
        _, within = found["select"]
        assert all(within[each] == select[each] for each in ("scores", "others", "wide_others"))
    driver.first.clear()
    driver.wanted.clear()
    del q, k, v, out, parameters, tensors, more, pooled
    gc.collect()
    assert [ref() is None for ref in held] == [True] * len(held)


@pytest.mark.parametrize(("name", "most"), [("sla", 17), ("sla, marginal", 16), ("vsa", 13), ("sla2", 31)])
def test_few_operators_of_torch_are_left(driver, name, most):
    """They keep the host longer than the launches: a call of a known kind has so many, allocations among them."""
    text, layout = CASES[name][0], Layout((16, 16))
    tensors = given(text, 0, kv_heads=2, layout=layout)
    for _ in range(2):
        call(text, tensors, layout)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call(text, tensors, layout)
    found = collections.Counter(e.name for e in seen.events() if e.cpu_parent is None and e.name.startswith("aten::"))
    assert sum(found.values()) <= most, found


@pytest.mark.parametrize("name", CASES)
def test_one_tensor_in_three_places_says_nothing_of_the_next_call(driver, name):
    text, launches = CASES[name]
    q, _, _, parameters = given(text, 0, kv_heads=2)
    others = given(text, 1, kv_heads=2)
    for tensors in ((q, q, q, parameters), others, others):
        call(text, tensors)
    found, at = by_name(driver[-launches:]), LAYOUT.prefix
    q, k, v = (t[:, at:].data_ptr() for t in others[:3])
    assert [m["x"] for m in found["part_means"][:2]] == [q, k]
    if name.startswith("vsa"):
        assert found["part_means"][2]["x"] == v
    else:
        assert found["group_states"][0]["k"] == k and found["join_states"][0]["q"] == q


def test_addresses_of_less_alignment_go_through_triton(driver):
    text, launches = CASES["sla2"]
    for seed in range(2):
        q, k, v, parameters = given(text, seed)
        call(text, (q, k, v, parameters))
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    before = len(driver.first), len(driver)
    call(text, (odd, k, v, parameters))
    # The kernels that read it; lists and states are started again.
    mine = {kernel.fn.__name__ for kernel, _ in driver.first[before[0] :]}
    assert mine == {"part_means", "attend", "join_states"}
    before = len(driver.first), len(driver)
    call(text, (q, k, v, parameters))
    assert (len(driver.first), len(driver)) == (before[0], before[1] + launches)


@pytest.mark.parametrize("name", CASES)
def test_masks_of_one_sample_begin_anywhere(driver, name):
    text, launches = CASES[name]
    for seed in range(3):
        *tensors, parameters = given(text, seed)
        mask = torch.ones(1, LAYOUT.length, dtype=torch.bool)
        call(text, (*(t[:1].clone() for t in tensors), parameters), key_mask=mask)
    assert len(driver.first) <= launches and len(driver) + len(driver.first) == 3 * launches


def test_heads_in_slices_have_their_own_addresses(driver, monkeypatch):
    monkeypatch.setattr(linear, "SLICE", 1)
    text, _ = CASES["sla2"]
    for seed in range(2):
        q, k, _, _ = tensors = given(text, seed, heads=4, kv_heads=2)
        out = call(text, tensors)
    found, at = by_name(driver[-11:]), LAYOUT.prefix
    assert [s["k"] for s in found["group_states"]] == [k[:, at:, head:].data_ptr() for head in (0, 1)]
    assert [j["q"] for j in found["join_states"]] == [q[:, at:, head:].data_ptr() for head in (0, 2)]
    assert [j["out"] for j in found["join_states"]] == [out[:, at:, head:].data_ptr() for head in (0, 2)]


@pytest.fixture
def tf32():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("tf32")
def test_another_precision_of_products_is_another_launch(driver):
    tensors = given(CASES["sla"][0], 0, torch.float32)
    call(CASES["sla"][0], tensors)
    torch.backends.cuda.matmul.allow_tf32 = True
    before = len(driver.first)
    call(CASES["sla"][0], tensors)
    after = [(kernel.fn.__name__, own.get("PRECISION")) for kernel, own in driver.first[before:]]
    assert ("group_states", "tf32") in after and ("join_states", "tf32") in after


def kernel_of(driver):
    """The means of a tensor, by `start_like`; what `prepare` does to it first is seen by nobody else."""
    from visattn.kernels.triton.choosing.choose import part_mean, part_tokens

    tokens = part_tokens(LAYOUT.grid, (8, 8), 1, torch.device("cpu"))

    def started(x, prepare):
        def first(x):
            found = part_mean(prepare(x), tokens, None, 1.0)
            return again.First(found)

        return again.start_like(("means", prepare), [x], first)

    return started


def test_what_a_first_call_makes_for_itself_is_no_table(driver):
    started, x = kernel_of(driver), torch.randn(2, 256, 2, 64)
    for _ in range(2):
        started(x, torch.clone)
    assert len(driver) == 1 and driver[-1][1]["x"] != x.data_ptr()
    kept = [e.value for e in STORE.entries() if isinstance(e.value, again.Again)]
    assert not kept
    started(x, lambda x: x)
    with pytest.raises(AssertionError, match="a view of a tensor"):
        started(x, lambda x: x[:, :])


def test_what_a_gpu_runs_is_asked_once(monkeypatch):
    from visattn.kernels.triton import backend

    asked, q = [], SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(2, 9, 3, 64))
    monkeypatch.setattr(backend, "fits", lambda *about: asked.append(about) or Support(about[2] == 64, "too wide"))
    monkeypatch.setattr(backend.Triton, "available", lambda self: Support(True))
    backend._on_gpu.cache_clear()
    try:
        assert [backend.on_gpu(q).ok for _ in range(3)] == [True] * 3
        q.shape = (2, 9, 3, 72)
        assert backend.on_gpu(q) == Support(False, "too wide")
    finally:
        backend._on_gpu.cache_clear()
    assert asked == [("cuda", torch.bfloat16, 64), ("cuda", torch.bfloat16, 72)]
