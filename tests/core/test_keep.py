"""What is kept between calls: usable in every mode, whichever mode made it, and bounded by bytes."""

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import visattn
from tests.support.cases import qkv
from visattn import keep
from visattn.keep import STORE, Store, kept, lasting
from visattn.kernels.plan_chunks import plan_tables
from visattn.layout import Layout
from visattn.plans import plan

LAYOUT = Layout((7, 6), 1, 2)
CALLS = {
    "listed": ("na(window=3)", "tiles"),
    "listed, masked": ("halo(block=4, halo=1)", "sdpa"),
    "by offsets": ("clear(radius=3, pool=2)", "tiles"),
    "routed": ("routing(regions=3x2, topk=2)", "tiles"),
    "routed, uneven parts": ("routing(regions=2x4, topk=2)", "sdpa"),
    "sigmoid": ("sigmoid(sparse=na(window=3))", "auto"),
    "sparse and linear": ("sparselinear(sparse=na(window=3))", "auto"),
    "reference": ("na(window=3)", "reference"),
    "initial parameters": ("sla2", "auto"),
    "random parameters": ("wersa", "auto"),
    "chosen by rows": ("best(of=[na(window=3), clear(radius=2)])", "auto"),
}


@contextlib.contextmanager
def default_device():
    with torch.device("meta"):
        yield


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "fake": FakeTensorMode,
    "default device": default_device,
    "flops": lambda: FlopCounterMode(display=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(autouse=True)
def _empty():
    visattn.clear_caches()
    yield
    visattn.clear_caches()


def trained(text, backend, seed=0):
    """Output and gradients of a call."""
    q, k, v = qkv(LAYOUT, dtype=torch.float32, dim=8, grad=True, seed=seed)
    out = visattn.attention(q, k, v, text, LAYOUT, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_call_in_a_mode_leaves_nothing_that_another_cannot_use(call, mode):
    text, backend = CALLS[call]
    true = trained(text, backend)
    visattn.clear_caches()
    with MODES[mode]():
        q, k, v = (torch.empty(1, LAYOUT.length, 2, 8, device="cpu") for _ in range(3))
        assert visattn.attention(q, k, v, text, LAYOUT, backend=backend).shape == q.shape
    assert all(torch.equal(a, b) for a, b in zip(trained(text, backend), true, strict=True))


def test_a_position_bias_needs_no_default_device():
    q, k, v = qkv(LAYOUT, dtype=torch.float32, dim=8)
    rpb = torch.randn(q.shape[2], 5, 5)
    true = visattn.attention(q, k, v, "na(window=3)", LAYOUT, rpb=rpb, backend="reference")
    with default_device():
        found = visattn.attention(q, k, v, "na(window=3)", LAYOUT, rpb=rpb, backend="reference")
    assert torch.equal(found, true)


@pytest.mark.parametrize("call", CALLS)
def test_fake_and_meta_tensors_get_shapes_and_leave_nothing(call):
    text, backend = CALLS[call]
    mode = FakeTensorMode()
    with mode:
        q = torch.empty(2, LAYOUT.length, 3, 8, dtype=torch.bfloat16)
        outputs = [visattn.attention(q, q, q, text, LAYOUT, backend=backend)]
    outputs.append(visattn.attention(q, q, q, text, LAYOUT, backend=backend))
    meta = torch.empty(2, LAYOUT.length, 3, 8, dtype=torch.bfloat16, device="meta")
    outputs.append(visattn.attention(meta, meta, meta, text, LAYOUT, backend=backend))
    assert {(tuple(out.shape), out.dtype) for out in outputs} == {(tuple(q.shape), torch.bfloat16)}
    assert [out.device.type for out in outputs] == ["cpu", "cpu", "meta"]
    with mode, pytest.raises(ValueError, match="has 45 tokens but q has 44"):
        visattn.attention(q[:, 1:], q[:, 1:], q[:, 1:], text, LAYOUT, backend=backend)
    assert not len(STORE)


def test_a_torch_func_transform_leaves_no_wrappers():
    made, tables = [], lambda: plan_tables(plan("na(window=3)", LAYOUT), torch.device("cpu"))

    def loss(x):
        made.append(tables().masks)
        return x.sum()

    torch.func.grad(loss)(torch.ones(3))
    assert type(made[0]) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(made[0])
    assert tables().masks is made[0]


class TestStore:
    def test_the_longest_unused_go_first_and_bytes_are_those_of_arrays(self):
        store = Store(limit=100, spare=1)
        for name in "abc":
            store.put(name, [np.zeros(30, np.uint8), "text", 5])
        store.find("a")
        store.put("d", torch.zeros(5))
        assert (store.find("b"), len(store), store.bytes) == (None, 3, 80)

    def test_an_array_that_several_hold_counts_once(self):
        store, array = Store(limit=100, spare=1), np.zeros(60, np.uint8)
        store.put("a", array)
        store.put("b", {"view": array[:5], "wide": np.broadcast_to(array, (100, 60))})
        assert store.bytes == 60
        store.put("c", np.zeros(90, np.uint8))
        assert (store.bytes, len(store)) == (90, 1)

    def test_shapes_without_memory_weigh_nothing(self):
        store = Store(limit=100, spare=0)
        store.put("a", torch.zeros(20))
        store.put("b", [torch.empty(10**9, device="meta"), torch.zeros(5)])
        assert (len(store), store.bytes) == (2, 100)

    def test_what_runs_stays_whatever_it_weighs(self):
        store = Store(limit=100, spare=2)
        for name in range(5):
            store.put(name, torch.zeros(400))
        assert len(store) == 2 and store.find(4) and store.find(3) and store.bytes == 3200

    def test_threads_get_one_value(self):
        built, gate = [], threading.Barrier(8)

        @kept
        def slow(number):
            built.append(number)
            return np.zeros(number)

        found = []

        def work():
            gate.wait()
            found.append(slow(7))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(value) for value in found}) == 1 and slow(7) is found[0]
        assert slow(3) is not found[0] and set(built) == {3, 7}

    def test_an_error_is_not_kept(self):
        @kept
        def fails(number):
            raise KeyError(number)

        for _ in range(2):
            with pytest.raises(KeyError):
                fails(1)


def test_plans_of_many_resolutions_are_bounded_by_bytes(monkeypatch):
    limit = 450_000
    monkeypatch.setattr(STORE, "limit", limit)
    monkeypatch.setattr(STORE, "spare", 1)
    plans, total = [], 0
    for side in range(24, 64, 2):
        layout = Layout((side, side + 8))
        q = torch.zeros(1, layout.length, 1, 8, requires_grad=True)
        visattn.attention(q, q, q, "na(window=5)", layout, backend="tiles").sum().backward()
        made = plan("clear(radius=3)", layout)
        tables = plan_tables(made, torch.device("cpu"))
        total += made.queries.tokens.nbytes + made.transposed.tile.nbytes + tables.masks.nbytes
        plans.append(weakref.ref(made))
        assert 0 < STORE.bytes <= limit
    assert total > limit
    assert plans[-1]() is made
    del made, q, tables
    gc.collect()
    assert sum(each() is not None for each in plans) < len(plans) / 2
    visattn.clear_caches()
    gc.collect()
    assert STORE.bytes == len(STORE) == 0 and not any(each() for each in plans)


def test_what_stays_is_made_in_another_thread_while_code_is_warmed_up(monkeypatch):
    monkeypatch.setattr(keep, "warms_up", lambda: True)
    waited = []
    stream = type("Stream", (), {"wait_stream": lambda self, other: waited.append(other)})()
    for name, value in {"current_device": 0, "set_device": None, "current_stream": stream, "default_stream": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert lasting(threading.get_ident) != threading.get_ident()
    assert waited == [1]
    with pytest.raises(KeyError, match="gone"):
        lasting({}.__getitem__, "gone")


@pytest.mark.gpu
def test_cuda_graphs_of_compiled_code_own_nothing_that_is_kept():
    layout = Layout((24, 20), 3)
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, layout.length, 2, 64, device="cuda", dtype=torch.bfloat16, generator=make)

    def call(q, k, v):
        return visattn.attention(q, k, v, "na(window=9x9)", layout, backend="triton") * 2

    fast = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        found = [fast(q, k, v).clone() for _ in range(4)]
        truth = call(q, k, v)
    for each in found:
        torch.testing.assert_close(each, truth)
