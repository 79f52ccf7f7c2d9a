"""Training runs of the scripts: their logs, their results, and runs that stop, are killed and go on."""

import json
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from tests.support.places import ROOT


def equal(one, other):
    """Whether two dicts of tensors have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stopped(monkeypatch, kind, name, done, call):
    """Call a run whose method `name` of its class `kind`, a step, raises once `done(run)` is true."""
    step = getattr(kind, name)

    def stop(self):
        if done(self):
            raise RuntimeError("stopped")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, stop)
        with pytest.raises(RuntimeError, match="stopped"):
            call()


def killed(command, checkpoint):
    """Run a command until it has written a checkpoint, a new one if there was one, and kill it."""
    psutil = pytest.importorskip("psutil")
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
        time.sleep(0.01)
    # What a launcher has started would go on without it, and holds its locks until it is gone.
    started = psutil.Process(process.pid).children(recursive=True)
    for each in (*started, process):
        each.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(started, timeout=60)


@contextmanager
def stopping(steps, kind=None):
    """Runs raise before the step that follows so many; of distillations, or of another class with a progress."""
    if kind is None:
        from scripts.distill.loop import Run as kind
    name = "train_step" if hasattr(kind, "train_step") else "step"
    step = getattr(kind, name)

    def stop(run):
        if getattr(run, "progress", run).step == steps:
            raise ValueError("stopped")
        return step(run)

    setattr(kind, name, stop)
    try:
        yield
    finally:
        setattr(kind, name, step)
