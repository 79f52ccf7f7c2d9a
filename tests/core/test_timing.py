"""Turns, warm-up, medians and spread of the timing helper."""

import time

import pytest

from visattn.timing import Timing, interleave


def test_runs_take_turns_after_their_warm_up():
    order = []
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=4, warmup=2)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab" + "ba"
    assert all(len(t.seconds) == 4 for t in timings.values())


def test_time_is_per_call_and_long_enough():
    calls = []
    timing = interleave({"sleep": lambda: (calls.append(1), time.sleep(0.002))}, repeats=2, at_least=0.02)["sleep"]
    assert 0.002 <= timing.median < 0.02
    assert len(calls) > 10


def test_synchronize_is_called_before_and_after_each_measurement():
    events = []
    interleave({"a": lambda: events.append("run")}, repeats=1, warmup=0, synchronize=lambda: events.append("wait"))
    assert events == ["wait", "wait", "run", "wait"]


def test_median_and_spread():
    assert Timing((3.0, 1.0, 2.0)).median == 2
    assert Timing((3.0, 1.0, 2.0)).spread == (1, 3)
    assert Timing((1.0, 2.0, 3.0, 4.0, 100.0)).spread == (2, 4)
    assert Timing((1.0,)).to_dict() == {"median": 1.0, "low": 1.0, "high": 1.0, "seconds": [1.0]}


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="repeats 0 must be at least 1 and warmup 1 at least 0"):
        interleave({}, repeats=0)
