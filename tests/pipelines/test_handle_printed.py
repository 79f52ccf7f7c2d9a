"""What printing a handle shows."""

import pytest

import visattn

pytest.importorskip("diffusers")

from tests.support import tiny_models


def test_a_handle_prints_what_was_applied():
    model, _ = tiny_models.dit()
    with visattn.apply(model, {"0": "dense", "1-": "na(window=3x3)"}) as handle:
        applied = "<visattn.Handle: dense, na(window=3x3), applied; remove() undoes it; report() tells what ran>"
        assert repr(handle) == str(handle) == applied
    assert repr(handle) == "<visattn.Handle: dense, na(window=3x3), removed; report() tells what ran>"
