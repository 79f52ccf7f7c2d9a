"""The dense model's samples, kept in a folder for the next process that compares patterns with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.measure.draftsman import DENSE, Draftsman, Drawn, Student
from scripts.measure.emoji_prompts import KINDS
from visattn.files import written_whole


class Twins:
    """Draws dense samples, or takes those that the folder has of the same captions, noise, model and device.

    Args:
        folder: Where they are kept; None: they are drawn each time.
        draftsman: Draws.
        settings: Of the results: all that samples depend on beside captions, size and torch.
    """

    def __init__(self, folder: Path | None, draftsman: Draftsman, settings: Mapping[str, Any]) -> None:
        self._folder, self._draftsman, self._settings = folder, draftsman, dict(settings)

    def drawn(self, size: int, times: bool) -> Drawn:
        """Samples of all captions.

        Args:
            size: Side in pixels.
            times: Whether their times are asked for: what is kept may have been drawn beside others.
        """
        if self._folder is None:
            return self._draftsman.draw(Student(DENSE), size)
        file = self._folder / f"{self._key(size)}.pt"
        if file.is_file() and not times:
            kept = torch.load(file, weights_only=True)
            pictures = {kind: values.float() for kind, values in kept.pop("pictures").items()}
            return Drawn(pictures=pictures, **kept)
        drawn = self._draftsman.draw(Student(DENSE), size)
        self._folder.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as path:
            pictures = {kind: _smallest(values) for kind, values in drawn.pictures.items()}
            torch.save(asdict(drawn) | {"pictures": pictures}, path)
        return drawn

    def _key(self, size: int) -> str:
        judge, options = self._draftsman.judge, self._draftsman.options
        captions = {kind: judge.captions(kind) for kind in KINDS}
        given = self._settings | {"size": size, "captions": captions, "device": options.device}
        given |= {"torch": torch.__version__, "at once": self._draftsman.batch(size)}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _smallest(values: torch.Tensor) -> torch.Tensor:
    """The same values in half of the bytes, where a model of bfloat16 made them."""
    halves = values.to(torch.bfloat16)
    return halves if torch.equal(halves.float(), values) else values
