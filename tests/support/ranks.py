"""Processes that stay: tests hand them functions to run together, as starting processes is what takes long.

They fork from one that has imported what takes seconds; on Linux, as libraries of other systems break in forks.
"""

from __future__ import annotations

import datetime
import importlib
import sys
import time
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
needs_context_parallel = pytest.mark.skipif(
    not hasattr(pytest.importorskip("diffusers"), "ContextParallelConfig"), reason="this diffusers has no parallelism"
)

IMPORTED = [
    *("torch._inductor.compile_fx", "torch._dynamo.backends.debugging", "functorch.compile"),
    *("diffusers.models.transformers", "visattn.pipelines.patch", "tests.parallel.models", "tests.parallel.sliced"),
]


class Ranks:
    """Processes; `run` calls a function of a module on some of them, as the ranks of a gloo group.

    Args:
        most: Number of processes.
        folder: Where they meet.
    """

    def __init__(self, most, folder):
        forks = sys.platform == "linux"
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(IMPORTED)
        self.pipes, self.processes = [], []
        for rank in range(most):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(folder), theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        self.world = self.group = self.jobs = 0
        # Processes that begin import what they need, which takes long where much else runs.
        self.patience = 200

    def run(self, world, function, *args):
        """What every rank of a group of `world` returns for `function(rank, *args)`; raises what the first raised."""
        self.group += world != self.world
        self.world = world
        self.jobs += 1
        for pipe in self.pipes[:world]:
            pipe.send((self.jobs, world, self.group, function.__module__, function.__qualname__, args))
        found = [self._answer(pipe) for pipe in self.pipes[:world]]
        wrong = [text for good, text in found if not good]
        assert not wrong, wrong[0]
        return [value for _, value in found]

    def _answer(self, pipe):
        """A rank's answer to the last job; those to earlier ones, for which nobody waited any more, are passed over."""
        until = time.monotonic() + self.patience
        while pipe.poll(max(0.0, until - time.monotonic())):
            job, *answer = pipe.recv()
            if job == self.jobs:
                return answer
        return False, f"no answer in {self.patience} s"

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _work(rank, folder, pipe):
    torch.set_num_threads(1)
    # diffusers divides by the number of accelerators.
    torch.accelerator.device_count = lambda: 1
    here = 0
    while (told := pipe.recv()) is not None:
        job, world, group, module, name, args = told
        try:
            if group != here:
                if dist.is_initialized():
                    dist.destroy_process_group()
                here = group
                meeting, wait = f"file://{folder}/meeting{group}", datetime.timedelta(seconds=180)
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=wait)
            pipe.send((job, True, getattr(importlib.import_module(module), name)(rank, *args)))
        except Exception:
            pipe.send((job, False, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()
