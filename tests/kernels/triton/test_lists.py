"""Kernels along lists, in the interpreter."""

import pytest

from tests.support.interpreted import passes

pytest.importorskip("triton")

pytestmark = pytest.mark.early


def test_kernels_in_the_interpreter():
    passes(lists=True)
