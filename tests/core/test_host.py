"""What a call like an earlier one costs the host: Python calls are counted, as times would measure the machine.

A bound that fails when work is added to every call is meant: look for what can be decided once before it is raised.
"""

import sys

import pytest
import torch

from visattn import Layout, attention, parse, register_backend
from visattn.dispatch import Backend, Support

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
        return q, None


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
    sys.setprofile(write)
    try:
        work()
    finally:
        sys.setprofile(before)
    return seen


def tensors(requires_grad=False):
    shape = (1, LAYOUT.length, 2, 32)
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize(("given", "bound"), [({}, 66), ({"key_mask": True}, 76)])
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
