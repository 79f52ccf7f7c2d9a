"""What a machine's memory cannot hold is refused with the reason, before the system ends the process for it."""

import numpy as np
import pytest
import torch

from visattn import Layout, memory, plan
from visattn.memory import check_room, is_shortage


def test_room_is_that_of_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 8 * 2**30)
    check_room(8 * 2**30, "a table", "take less")
    with pytest.raises(ValueError, match="a table would take 12 GiB, and this machine has 8: take less"):
        check_room(12 * 2**30, "a table", "take less")
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    check_room(2**60, "a table", "where the system does not tell, nothing is refused")


@pytest.mark.parametrize(
    ("pattern", "layout", "text"),
    [
        # One for each place that makes lists: axes, their products, rings, circles, and text before the grid.
        ("na(window=9x9)", Layout((64, 64)), r"listing [\d.e+]+ pairs of tiles on 64x64 tokens would take"),
        ("na(window=9x9, circular=true)", Layout((64, 64)), "pairs of tiles on 64x64 tokens"),
        ("dense", Layout(4096), "pairs of tiles on 4096 tokens"),
        ("clear(radius=9)", Layout((64, 64)), "pairs of tiles on 64"),
        ("na(window=3x3)", Layout((8, 8), prefix=4096), "pairs of tiles on 8x8 tokens"),
    ],
)
def test_lists_that_do_not_fit_are_refused(monkeypatch, pattern, layout, text):
    # Its tokens fit, its lists do not.
    monkeypatch.setattr(memory, "machine_memory", lambda: 24 * 2 * layout.length)
    with pytest.raises(ValueError, match=text):
        plan(pattern, layout, (2,) * layout.dims)


@pytest.mark.parametrize("pattern", ["na(window=9x9)", "topk(keep=0.5)", "halo(block=4, halo=1)"])
def test_tokens_that_do_not_fit_are_refused(monkeypatch, pattern):
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"planning .* on 24x40 would take .*: take a smaller grid"):
        plan(pattern, Layout((24, 40)))


def test_a_shortage_is_known_by_its_error():
    for short in (lambda: np.empty(2**50), lambda: torch.empty(2**60), lambda: torch.empty(2**62, dtype=torch.float64)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            short()
        assert is_shortage(caught.value), caught.value
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_shortage(RuntimeError("a bug")) and not is_shortage(ValueError("out of memory"))
