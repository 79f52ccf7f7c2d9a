"""Cached samples: shards of clean latents and of what the denoiser was told about them.

A folder holds `index.json`, written last, `constants.safetensors` and `shard-00000.safetensors` and so on. A shard has
`latents` [N, ...] and every argument of the denoiser that belongs to a sample, [N, rows, ...]: a sampler with guidance
calls the denoiser with several rows for one sample (with the condition and without it).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visattn.files import opened, write_json, written_whole

LATENTS = "latents"
NULL_SAMPLES = 4  # that are looked at for the row without a condition
HELD = 8  # times the size of all samples that have to be free on a GPU which holds them
AGAIN = "cache the samples again, into an empty folder"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Index:
    """What is known about all samples of a folder.

    Attributes:
        model: Name, folder or hub id of the pipeline.
        denoiser: Its component that denoises.
        anchor: Argument of the denoiser that carries the noisy latents.
        time_scale: What the denoiser gets as `timestep` is the scheduler's time by this factor.
        kind: What the denoiser predicts, see `noise.Noise`.
        timesteps: Times that the sampler visited, descending, in the scheduler's units (0 to 1000).
        plain: Further arguments of the denoiser: numbers, texts, truth values.
        settings: What made the samples.
        shards: Samples in each shard.
    """

    model: str
    denoiser: str
    anchor: str
    time_scale: float
    kind: str
    timesteps: list[float]
    plain: dict[str, Any]
    settings: dict[str, Any]
    shards: list[int] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes index.json."""
        write_json(folder / "index.json", asdict(self))


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json of a folder says.

    Raises:
        ValueError: If it is damaged, or of something else.
    """
    path = folder / "index.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {AGAIN}") from error
    missing = [entry.name for entry in fields(Index) if not isinstance(known, dict) or entry.name not in known]
    if missing:
        raise ValueError(f"{path} says nothing of {missing[0]}: {AGAIN}")
    return known


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as a whole file or not at all."""
    with written_whole(path) as temporary:
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, temporary, metadata
        )


class SampleSet:
    """The samples of a folder, read one by one when they are asked for.

    Raises:
        ValueError: If the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        known = read_index(folder)
        self.folder = folder
        self.index = Index(**{entry.name: known[entry.name] for entry in fields(Index)})
        self._told: dict[torch.device, dict[str, torch.Tensor]] = {}
        self._on: dict[torch.device, dict[str, torch.Tensor] | None] = {}
        self._places = [(s, i) for s, count in enumerate(self.index.shards) for i in range(count)]
        missing = [s for s in range(len(self.index.shards)) if not shard_path(folder, s).is_file()]
        if missing or not self._places:
            raise ValueError(f"{folder} lacks {shard_path(folder, (missing or [0])[0]).name}: {AGAIN}")
        self._check_shards()

    def _check_shards(self) -> None:
        """Look at what is in every shard, of which only the beginnings are read."""
        first = None
        for number, count in enumerate(self.index.shards):
            path = shard_path(self.folder, number)
            with opened(path, "shard of samples", AGAIN) as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            kinds = {name: shape[1:] for name, shape in shapes.items()}
            first = first or kinds
            if LATENTS not in shapes or kinds != first or any(shape[0] != count for shape in shapes.values()):
                raise ValueError(f"{path} holds other samples than index.json says: {AGAIN}")

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def constants(self) -> dict[str, torch.Tensor]:
        """Arguments of the denoiser that are the same for every sample."""
        return load_file(self.folder / "constants.safetensors")

    def told(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What every denoising call is told alike, on a device: the very same tensors at each call.

        visattn reads the grid from position ids once for a tensor, which waits for the device.
        """
        if device not in self._told:
            fixed = {name: value for name, value in self.constants.items() if not name.startswith("noise.")}
            self._told[device] = {name: ready(value, device) for name, value in fixed.items()}
        return self._told[device]

    @cached_property
    def _files(self) -> list[Any]:
        return [safe_open(shard_path(self.folder, s), framework="pt") for s in range(len(self.index.shards))]

    @cached_property
    def null_row(self) -> int:
        """Which of the two rows of each sample's arguments is that without a condition: the same for all samples.

        Raises:
            ValueError: If the samples were not drawn with guidance by two rows, or with one condition alone.
        """
        some = range(0, len(self), max(1, len(self) // NULL_SAMPLES))
        found = [self.take([i] * 2, torch.tensor([0.25, 0.75]))[1] for i in some]
        alike = [
            all(torch.equal(each[name][row], found[0][name][row]) for each in found for name in each)
            for row in range(2)
        ]
        if sum(alike) != 1:
            raise ValueError(
                f"{self.folder} does not tell rows with a condition from those without: --guidance needs samples that "
                "were drawn with guidance, of several prompts or labels"
            )
        return alike.index(True)

    def take(
        self, picks: list[int], rows: torch.Tensor, device: torch.device = CPU
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents [B, ...] and arguments [B, ...] of some samples, on a device.

        Args:
            picks: Indices of the samples.
            rows: Numbers from 0 up to 1 [B] on the CPU that choose a row of each sample's arguments.
            device: Where they are wanted.
        """
        held = self._held(device)
        tensors = self._read(picks, rows, device) if held is None else _picked(held, picks, rows, device)
        return tensors.pop(LATENTS), tensors

    def _read(self, picks: list[int], rows: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Some samples from their files."""
        found: dict[str, list[torch.Tensor]] = {}
        for pick, row in zip(picks, rows.tolist(), strict=True):
            shard, i = self._places[pick]
            file = self._files[shard]
            for name in file.keys():  # noqa: SIM118
                value = file.get_slice(name)[i : i + 1]
                if name != LATENTS:
                    value = value[:, int(row * value.shape[1])]
                found.setdefault(name, []).append(value)
        return {name: sent(torch.cat(values), device) for name, values in found.items()}

    def _held(self, device: torch.device) -> dict[str, torch.Tensor] | None:
        """All samples on a GPU, if they are a small part of what is free there; None where files are read."""
        if device not in self._on:
            paths = [shard_path(self.folder, s) for s in range(len(self.index.shards))]
            fits = HELD * sum(path.stat().st_size for path in paths) <= room(device)
            self._on[device] = _joined([load_file(path) for path in paths], device) if fits else None
        return self._on[device]


def room(device: torch.device) -> int:
    """Bytes that are free on a GPU; none on a CPU, which reads files as fast as its memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _joined(shards: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.cat([shard[name] for shard in shards]).to(device) for name in shards[0]}


def _picked(
    held: dict[str, torch.Tensor], picks: list[int], rows: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """Some of the samples that are on a device."""
    index, found = sent(torch.tensor(picks), device), {}
    for name, value in held.items():
        # As Python multiplies: float32 would round some products up to the number of rows.
        row = () if name == LATENTS else (sent((rows.double() * value.shape[1]).long(), device),)
        found[name] = value[index, *row]
    return found


def sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; a GPU that works is not waited for."""
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


def ready(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An argument of a denoiser on a device, float32 if it is of floating point."""
    return sent(value.float() if value.is_floating_point() else value, device)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`, for arguments that are dictionaries."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return found
