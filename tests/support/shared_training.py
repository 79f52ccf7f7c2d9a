"""Runs of the training scripts on several processes of `Ranks`."""

import importlib
import os

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

from scripts.distill.sharing import share_weights
from tests.support.runs import stopping
from tests.support.tiny_digits import tiny_transformer


def main(rank, script, words, steps=None):
    """Call a script's main on every process as a launcher would; `steps`: after so many it dies, without a word.

    Returns the text of the ValueError or SystemExit that it ends with.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_PORT": "1"}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    module = importlib.import_module(script)
    try:
        if steps is None:
            module.main(words)
        else:
            with stopping(steps, getattr(module, "Extension", None)):
                module.main(words)
    except (ValueError, SystemExit) as error:
        return str(error)
    return ""


class Both(torch.nn.Module):
    """A student and its teacher."""

    def __init__(self):
        super().__init__()
        self.student, self._teacher = tiny_transformer(), [tiny_transformer()]

    @property
    def teacher(self):
        return self._teacher[0]


def parts(rank):
    """Numbers of the student's and of the teacher's weights that this process has."""
    both = Both()
    share_weights(both, torch.device("cpu"))
    return tuple(sum(local(p).numel() for p in model.parameters()) for model in (both.student, both.teacher))


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x
