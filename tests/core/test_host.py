"""What a call like an earlier one costs the host: Python calls are counted, as times would measure the machine.

A bound that fails when work is added to every call is meant: look for what can be decided once before it is raised.
"""

import gc
import sys
from functools import partial

import pytest
import torch

from visattn import Layout, attention, clear_caches, ops, parse, register_backend
from visattn.dispatch import Backend
from visattn.problem import Support

LAYOUT = Layout((16, 16), 7)


class Nothing(Backend):
    """Runs every call in no time."""

    name = "nothing"

    def available(self):
        return Support(True)

    def supports(self, problem):
        return Support(True)

    def cost(self, problem):
        return float("inf")

    def run(self, q, k, v, call):
        return torch.empty_like(q), None


@pytest.fixture
def nothing():
    with register_backend(Nothing()):
        yield


def python_calls(work):
    """Names of the Python functions that are called."""
    seen = []

    def write(frame, event, _):
        if event == "call":
            seen.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    before = sys.getprofile()
    # What the collector calls for garbage of other tests is not the work's.
    gc.disable()
    sys.setprofile(write)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return seen


def tensors(requires_grad=False):
    shape = (1, LAYOUT.length, 2, 32)
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize(("given", "bound"), [({}, 12), ({"key_mask": True}, 16)])
@pytest.mark.parametrize("pattern", ["na(window=7x7,stride=2x2)", "clear(radius=3)", parse("radial(decay=0.5)")])
def test_a_kept_call(nothing, pattern, given, bound):
    layout = LAYOUT if "radial" not in str(pattern) else Layout((1, 16, 16), 7)
    options = dict(given)
    if options.get("key_mask"):
        options["key_mask"] = torch.ones(1, layout.length, dtype=torch.bool)
    q, k, v = tensors()

    def call():
        attention(q, k, v, pattern, layout, backend="nothing", **options)

    for _ in range(2):
        call()
    seen = python_calls(call)
    assert len(seen) <= bound, f"{len(seen)} calls: {seen}"


def test_a_kept_call_of_the_operator(nothing):
    """What compiled code calls: the layers of torch around an operator are not among them."""
    q, k, v = tensors()
    call = partial(ops.ATTEND, q, k, v, None, None, [], "na(window=7x7)|nothing||", [7, 0, 16, 16], 0.2, False)
    with torch.no_grad():
        for _ in range(2):
            out, lse = call()
        seen = python_calls(call)
    assert out.shape == q.shape and lse.shape == (0,)
    assert len(seen) <= 13, f"{len(seen)} calls: {seen}"


def test_an_engine_that_gives_back_its_input_is_no_operator(nothing, monkeypatch):
    monkeypatch.setattr(Nothing, "run", lambda self, q, k, v, call: (q[:], None))
    q, k, v = tensors()
    with pytest.raises(ValueError, match="gave back its input for na"):
        ops.ATTEND(q, k, v, None, None, [], "na(window=7x7)|nothing||", [7, 0, 16, 16], 0.3, False)


def own(seen):
    """The functions of this package among those that were called, without those that stand in for the driver."""
    names = [name for name in seen if "fake_driver" not in name and not name.startswith("Launches.")]
    return [name for name in names if "<lambda>" not in name]


@pytest.fixture
def driver():
    pytest.importorskip("triton")
    from tests.support.fake_driver import fake_driver

    with fake_driver() as seen:
        seen.quiet = True
        yield seen
    clear_caches()


@pytest.mark.parametrize(
    ("pattern", "bounds"), [("na(window=7x7)", (11, 15, 38)), ("routing(4x4,topk=2)", (26, 30, 46))]
)
def test_a_prepared_call_on_a_gpu(driver, pattern, bounds):
    """No gradient, forward with gradient, backward: of the last 28 are torch's own, in release 2.14."""
    inputs = [torch.randn(1, LAYOUT.length, 2, 64, dtype=torch.float16) for _ in range(3)]
    learning = [t.clone().requires_grad_() for t in inputs]
    call = partial(attention, *inputs, pattern, LAYOUT, backend="triton")
    forward = partial(attention, *learning, pattern, LAYOUT, backend="triton")
    out = forward()
    backward = partial(torch.autograd.grad, out, learning, torch.ones_like(out), retain_graph=True)
    for work, bound in zip((call, forward, backward), bounds, strict=True):
        for _ in range(2):
            work()
        seen = own(python_calls(work))
        assert len(seen) <= bound, f"{len(seen)} calls: {seen}"


def test_a_prepared_call_under_autocast(driver):
    inputs = [torch.randn(1, LAYOUT.length, 2, 64) for _ in range(3)]
    call = partial(attention, *inputs, "na(window=7x7)", LAYOUT, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            out = call()
        seen = own(python_calls(call))
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == torch.bfloat16 and len(seen) <= 16, f"{len(seen)} calls: {seen}"


@pytest.mark.parametrize("pattern", ["na(window=7x7)", "na(window=8x8,stride=4x4)"])
def test_a_kept_call_of_the_cpu_engine(pattern):
    """Four shapes of problems and the text's: what is left are torch's operators and the moves around them."""
    inputs = tensors()
    call = partial(attention, *inputs, pattern, LAYOUT, backend="tiles")
    for _ in range(2):
        call()
    seen = python_calls(call)
    assert len(seen) <= 60, f"{len(seen)} calls: {seen}"
