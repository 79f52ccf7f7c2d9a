"""Counts and times of attention calls: exact counts, first calls apart, on a GPU some calls timed."""

import threading
import time

import pytest
import torch

from visattn import Layout, parse
from visattn.problem import Problem
from visattn.tally import EVERY, MANY_CALLS, SELDOM, Tally, all_timed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBLEM = Problem(parse("na(window=3x3)"), Layout((4, 4)), 1, 2, 2, 8, torch.float32, "cuda")


class Event:
    """A CUDA event on a clock of whole milliseconds."""

    now = 0.0
    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self):
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at

    def synchronize(self):
        pass

    def query(self):
        return True


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that takes as long as it is told."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Event.now, Event.made = 0.0, 0
    return Event


def call(tally, cell, milliseconds):
    begun = tally.begin(cell)
    Event.now += milliseconds
    tally.end((cell,), begun)


def test_few_calls_on_a_gpu_are_timed_and_all_are_counted(gpu):
    tally = Tally()
    cell = tally.cell("a", "sparse", None, GPU, PROBLEM)
    for i in range(1000):
        call(tally, cell, 500.0 if i == 0 else 2.0)
    timed = len(range(1, MANY_CALLS, EVERY)) + len(range(SELDOM + 1, 1000, SELDOM))
    assert gpu.made == 2 * (1 + timed) < 150
    row = tally.rows()["a"]
    assert row.hits == {PROBLEM: 1000} and (row.calls, row.timed) == (1000, timed)
    assert row.first_seconds == pytest.approx(0.5)
    assert row.seconds["sparse"] == pytest.approx(2.0) and row.seconds["dense"] == 0


@pytest.mark.parametrize("period", [2, 4, 8])
def test_what_happens_every_few_calls_is_timed_as_often(gpu, period):
    """Calls that compute anew for those after them: of each module as many are timed as there are."""
    tally, calls = Tally(), 4 * period * SELDOM
    for i in range(calls):
        for site in "abc":
            call(tally, tally.cell(site, "sparse", None, GPU, PROBLEM), 9.0 if i % period == 0 else 1.0)
    truth = calls * (1 + 8 / period) / 1000
    assert [row.seconds["sparse"] for row in tally.rows().values()] == pytest.approx([truth] * 3, rel=0.3)


def test_all_calls_are_timed_where_that_is_asked_for(gpu):
    with all_timed():
        tally = Tally()
    # The first of four chooses for all of them.
    for milliseconds in (9.0, 1.0, 1.0, 1.0):
        for site in "ab":
            call(tally, tally.cell(site, "sparse", None, GPU, PROBLEM), milliseconds)
    rows = tally.rows()
    assert [rows[site].seconds["sparse"] for site in "ab"] == pytest.approx([0.012] * 2)
    assert [(rows[site].timed, rows[site].first_seconds) for site in "ab"] == [(4, 0.0)] * 2


def test_the_first_call_of_a_kind_is_estimated_from_those_of_other_modules(gpu):
    tally = Tally()
    for step in range(2 * EVERY):
        before = gpu.made
        for site, milliseconds in (("a", 900.0 if step == 0 else 4.0), ("b", 3.0), ("c", 5.0)):
            call(tally, tally.cell(site, "sparse", None, GPU, PROBLEM), milliseconds)
        # Never all of them at once.
        assert gpu.made - before <= 2
    rows, n = tally.rows(), 2 * EVERY
    assert [rows[site].seconds["sparse"] for site in "abc"] == pytest.approx([0.004 * n, 0.003 * n, 0.005 * n])
    assert [rows[site].first_seconds for site in "abc"] == pytest.approx([0.9, 0, 0])
    assert [rows[site].timed for site in "abc"] == [2, 2, 2]


def test_modules_that_were_not_timed_yet_take_what_others_did(gpu):
    tally = Tally()
    for _ in range(2):
        for site in "abcdefgh":
            call(tally, tally.cell(site, "sparse", None, GPU, PROBLEM), 2.0)
    assert [row.seconds["sparse"] for row in tally.rows().values()] == pytest.approx([0.004] * 8)
    assert sum(row.timed for row in tally.rows().values()) == 1


def test_a_lone_first_call_is_all_that_is_known(gpu):
    tally = Tally()
    call(tally, tally.cell("a", "dense", None, GPU), 7.0)
    assert tally.rows()["a"].seconds["dense"] == pytest.approx(0.007)


def test_calls_in_a_graph_are_counted_and_not_timed(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tally = Tally()
    call(tally, tally.cell("a", "sparse", None, GPU, PROBLEM), 7.0)
    assert gpu.made == 0
    assert tally.rows()["a"].hits == {PROBLEM: 1} and tally.rows()["a"].seconds["sparse"] == 0


def test_events_are_read_before_they_pile_up(gpu, monkeypatch):
    monkeypatch.setattr("visattn.tally.MANY_EVENTS", 4)
    tally = Tally()
    cells = [tally.cell(str(i), "sparse", None, GPU, PROBLEM) for i in range(10)]
    for cell in cells:
        call(tally, cell, 1.0)
        call(tally, cell, 1.0)
    assert len(tally._events) < 4
    assert sum(row.seconds["sparse"] for row in tally.rows().values()) == pytest.approx(0.02)


def test_every_call_on_a_cpu_is_timed():
    tally = Tally()
    cell = tally.cell("a", "sparse", None, CPU, PROBLEM)
    for _ in range(60):
        begun = tally.begin(cell)
        time.sleep(1e-4)
        tally.end((cell,), begun)
    row = tally.rows()["a"]
    assert row.timed == 59 and 60e-4 <= row.seconds["sparse"] < 1


def test_samples_with_layouts_of_their_own_share_the_time_of_their_call(gpu):
    tally = Tally()
    other = Problem(parse("na(window=3x3)"), Layout((2, 4)), 1, 2, 2, 8, torch.float32, "cuda")
    cells = [tally.cell("a", "sparse", None, GPU, each) for each in (PROBLEM, other)]
    for milliseconds in (80.0, 8.0):
        begun = tally.begin(cells[0])
        Event.now += milliseconds
        tally.end(cells, begun)
    row = tally.rows()["a"]
    assert row.hits == {PROBLEM: 2, other: 2} and row.seconds["sparse"] == pytest.approx(0.016)


def test_what_is_no_call_adds_time_alone():
    tally = Tally()
    with tally.timed("a", "sparse", CPU):
        time.sleep(1e-3)
    row = tally.rows()["a"]
    assert row.calls == 0 and row.seconds["sparse"] >= 1e-3


def test_kept_calls_are_dense_and_say_what_they_were(gpu):
    tally = Tally()
    call(tally, tally.cell("a", "dense", None, GPU, PROBLEM, kept=True), 1.0)
    tally.count("a")
    tally.count("a", "it is causal")
    row = tally.rows()["a"]
    assert (row.dense, dict(row.kept), dict(row.fallbacks)) == (2, {PROBLEM: 1}, {"it is causal": 1})
    assert tally.counts() == {"a": 3}


def test_no_count_is_lost_between_threads():
    tally = Tally()

    def work():
        for _ in range(2000):
            cell = tally.cell("a", "sparse", None, CPU, PROBLEM)
            tally.end((cell,), tally.begin(cell))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.rows()["a"].hits == {PROBLEM: 8000}
