"""Processes that begin together: the error or death of one ends all of them, with its text, and the command line's."""

import importlib
import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from tests.support.places import ROOT
from tests.support.ranks import needs_gloo
from visattn.parallel import together

pytestmark = needs_gloo

PROGRAM = """
import os, sys, torch, torch.distributed as dist
from visattn.parallel.processes import together
with together("cpu", timeout=60) as place:
    dist.barrier()
    if not place.first:
        {what}
    dist.recv(torch.zeros(1), 1)
"""


def processes(what):
    """Exit statuses and what was said of two processes, of which the second does something."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", PROGRAM.format(what=what)]
        running.append(
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | place | {"OMP_NUM_THREADS": "1"}
            )
        )
    said = [process.communicate(timeout=100)[1] for process in running]
    return [process.returncode for process in running], said


@pytest.fixture
def quick(monkeypatch):
    module = importlib.import_module("visattn.parallel.processes")
    monkeypatch.setattr(module, "EVERY", 0.01)
    monkeypatch.setattr(module, "GRACE", 0.02)
    return module


def watched(module, store, silent=60.0):
    """The watch of the first of two processes, and the statuses with which it would end it."""
    ended = []
    return module._Watch(store, module.Place(0, 2, "cpu"), silent, ended.append), ended


def until(condition):
    stop = time.monotonic() + 5
    while not condition() and time.monotonic() < stop:
        time.sleep(0.01)
    assert condition()


def test_the_first_error_ends_the_others_with_its_text(quick, capsys):
    store = dist.HashStore()
    watch, ended = watched(quick, store)
    other = quick._Watch(store, quick.Place(1, 2, "cpu"), 60.0, ended.append)
    watch.start()
    assert not other.tell("the prompt is too long")
    until(lambda: ended == [1])
    assert capsys.readouterr().err == "visattn: process 1: the prompt is too long\n"
    assert watch.tell("something later") == "process 1: the prompt is too long"
    watch.stop()


def test_a_silent_process_ends_the_others(quick, capsys):
    store = dist.HashStore()
    store.set("alive1", "7")
    watch, ended = watched(quick, store, silent=0.1)
    watch.start()
    until(lambda: ended == [1])
    assert "process 1 has said nothing for 0 s" in capsys.readouterr().err
    watch.stop()


def test_processes_need_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="start with torchrun"), together():
        pass


@pytest.mark.dist
@pytest.mark.slow
def test_an_error_of_one_process_ends_both():
    codes, said = processes("raise ValueError('no such frame')")
    assert all(codes)
    assert "visattn: process 1: no such frame" in said[0]
    assert "no such frame" in said[1]


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_process_ends_the_other():
    codes, said = processes("os.kill(os.getpid(), 9)")
    assert codes[1] == -9 and codes[0] not in (0, -9)
    assert "broke, as when one of them ends" in said[0]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["halo", "ulysses"])
def test_the_command_line_writes_what_one_process_writes(how, tmp_path):
    pytest.importorskip("av")
    from tests.support.tiny_moving_digits import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "model")
    words = ["-m", "visattn", "generate", "video", "--model", str(tmp_path / "model"), "--steps", "2"]
    words += ["--pattern", "na(window=3x3x3)", "--device", "cpu", "--out"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    quiet = {"cwd": ROOT, "check": True, "timeout": 200, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    subprocess.run([sys.executable, *words, str(tmp_path / "one")], **quiet)
    subprocess.run([*several, *words, str(tmp_path / how), "--parallel", how], **quiet)
    one, found = ((tmp_path / name / "sheet-000.png").read_bytes() for name in ("one", how))
    assert one == found
