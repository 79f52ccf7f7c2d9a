"""What a run writes down while it learns: JSON lines, and TensorBoard if asked for."""

from __future__ import annotations

import json
from typing import Any

from scripts.distill.settings import RunConfig
from scripts.distill.state import trim_log

LOG = "log.jsonl"


class Log:
    """JSON lines, and TensorBoard if asked for; silent in all processes but the first."""

    def __init__(self, config: RunConfig, active: bool, step: int) -> None:
        self._file = self._board = None
        if not active:
            return
        trim_log(config.out / LOG, step)
        self._file = (config.out / LOG).open("a", buffering=1)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(config.out / "tensorboard", purge_step=step)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Adds a line."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step} | figures) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for each in (self._file, self._board):
            if each is not None:
                each.close()
