"""What every test relies on: no network, few threads, seeded randomness, GPU tests only where there is one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("visattn", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("visattn")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _repeatable():
    # Workers of pytest-xdist share the cores: more threads than cores make small operations wait.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
