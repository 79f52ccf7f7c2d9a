"""What every test relies on: no network, few threads, seeded randomness, GPU tests only where there is one."""

import collections
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from visattn import crossing

# Imports make millions of objects that stay: looking through them again and again takes a tenth of the suite's time.
gc.disable()

hypothesis.settings.register_profile("visattn", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("visattn")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Collect garbage of tests alone, and less often than 700 objects make it necessary."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU on a machine without one: a skip apiece would hide those that a person can act on."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        long_files_first(items)
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if "gpu" in item.keywords]
    if left_out:
        items[:] = [item for item in items if "gpu" not in item.keywords]
        config.hook.pytest_deselected(items=left_out)


def long_files_first(items):
    """Files that are marked so and then those of many tests come first, so that the workers end together."""
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: ("early" not in item.keywords, -tests[item.path]))


def pytest_terminal_summary(terminalreporter):
    """Say what was left out; with workers of pytest-xdist nobody else does."""
    if not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device: the tests marked gpu are left out (there: pytest -m gpu)")


@pytest.fixture(autouse=True)
def _runs_patterns(request):
    """Patterns run in tiny models, where dense attention is the faster one on a CPU too, unless a test is about that.

    Nothing else differs: who runs a call, and what reports say of it but for these estimates.
    """
    if request.node.get_closest_marker("crossing"):
        yield
        return
    before, crossing.DEVICES = crossing.DEVICES, ("cuda",)
    yield
    crossing.DEVICES = before


@pytest.fixture(autouse=True)
def _repeatable():
    # Workers of pytest-xdist share the cores: more threads than cores make small operations wait.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
