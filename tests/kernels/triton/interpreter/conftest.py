"""These run where TRITON_INTERPRET=1 was set before triton was imported: ../test_backend.py starts them so."""

import os
import warnings

import pytest
import torch

from tests.support.swift_interpreter import hasten

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten(pytest.importorskip("triton.runtime.interpreter"))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned():
    """What torch.empty returns is full of NaN, so that a value no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        # Numpy computes log2(0) = -inf and overflows that the kernels mean.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield
    torch.use_deterministic_algorithms(False)
