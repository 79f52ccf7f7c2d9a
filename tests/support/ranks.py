"""Processes that stay: tests hand them functions to run together, as starting processes is what takes long."""

from __future__ import annotations

import datetime
import importlib
import traceback

import torch
import torch.distributed as dist


class Ranks:
    """A spawned gloo group; `run` calls a function of a module on every rank and returns what each gives.

    Args:
        world: Number of ranks.
        folder: Where they meet.
    """

    def __init__(self, world, folder):
        context = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, str(folder), theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *args):
        """What every rank returns for `function(rank, *args)`; raises with the text of the first that raised."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        found = [pipe.recv() if pipe.poll(60) else (False, "no answer in 60 s") for pipe in self.pipes]
        wrong = [text for good, text in found if not good]
        assert not wrong, wrong[0]
        return [value for _, value in found]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _work(rank, world, folder, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=40),
    )  # fmt: skip
    while (job := pipe.recv()) is not None:
        module, name, args = job
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
