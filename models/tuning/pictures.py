"""Pictures for a search: a folder of image files, or anything that gives tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from visattn.models.load import as_input, open_image
from visattn.tuning.plan import HELD_OUT

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Pictures:
    """Pictures in two halves: those that are measured, and those held out.

    Attributes:
        get: Gives the tensor [C, H, W] of a picture.
        count: How many there are.
        labels: Class of each, None if unknown.
        name: What the journal calls them.
    """

    get: Callable[[int], torch.Tensor]
    count: int
    labels: tuple[int, ...] | None = None
    name: str = ""

    @classmethod
    def of_folder(cls, folder: Path, model: torch.nn.Module, size: int | None = None) -> Pictures:
        """The images of a folder; where they are in subfolders, these are the classes in the order of their names.

        Raises:
            ValueError: If it is no folder, or has fewer than two images.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: pass one of images")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise ValueError(f"{folder} has {len(files)} images ({', '.join(SUFFIXES)}): give at least two")
        classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
        labels = None
        if classes and all(path.parent != folder for path in files):
            labels = tuple(classes.index(path.relative_to(folder).parts[0]) for path in files)
        return cls(lambda i: as_input(open_image(files[i]), model, size)[0], len(files), labels, str(folder))

    def of_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Which pictures samples are: of those that verify none is measured.

        Raises:
            ValueError: If there are not as many.
        """
        order = random.Random(0).sample(range(self.count), self.count)
        half = self.count // 2
        found = []
        for seed in seeds:
            turn, number = divmod(seed, HELD_OUT)
            part = order[:half] if turn == 0 else order[half:]
            # Another round of verifying begins elsewhere among those held out.
            found.append(part[(number + max(turn - 1, 0) * half // 3) % len(part)])
        if len(set(found)) < len(found):
            raise ValueError(
                f"{self.count} pictures are too few: {len(found)} samples are asked for, of one half of them"
            )
        return found
