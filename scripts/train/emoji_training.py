"""Parts of the emoji training: settings, where a run stands, batches, loss, checkpoints."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from scripts.train.emoji_captions import TOKENS
from scripts.train.emoji_data import Pack
from scripts.train.emoji_model import PATCH, EmojiModel, time_shift
from scripts.train.emoji_sources import SIDE
from visattn.files import written_whole
from visattn.pipelines.embedded.pixel_flux import predict_clean
from visattn.pipelines.embedded.prompts import encode_tokens

FILE_BYTES = 15_000_000
LEAST_NOISE = 0.05
EVEN = 16  # larger batches are multiples of it, so that their parts are alike and compile once


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one training; the checks run before any work.

    Attributes:
        budget: Seconds of training in all commands together; the schedule follows them. 0: follows `steps`.
        steps: Steps in all, where there is no budget.
        sides: Side in pixels of each stage.
        shares: Part of the budget at which each stage ends, the last at 1.
        mixed: Part of the steps of a stage that take a smaller side of `sides`, so that none is forgotten.
        tokens: Text and image tokens of a step on each device.
        lr: Learning rate of both optimizers.
        decay_from: Part of the budget from which the learning rate goes down.
        warmup: Steps at the start and after every restart of the optimizers.
        weight_decay: Of the matrices inside blocks.
        ema: Decay of the average.
        spread: Standard deviation of the noise levels' logits.
        dropped: Share of captions replaced with the empty one.
        seed: Of everything random.
        heads: Heads of 64 of transformer and text encoder.
        double: Double blocks.
        single: Single blocks.
        text: Layers of the text encoder.
    """

    budget: float = 1300.0
    steps: int = 0
    sides: tuple[int, ...] = (64, 128, 256)
    shares: tuple[float, ...] = (0.14, 0.5, 1.0)
    mixed: float = 0.2
    tokens: int = 270_000
    lr: float = 3e-3
    decay_from: float = 0.6
    warmup: int = 40
    weight_decay: float = 0.05
    ema: float = 0.999
    spread: float = 1.2
    dropped: float = 0.1
    seed: int = 0
    heads: int = 3
    double: int = 3
    single: int = 8
    text: int = 3

    def __post_init__(self) -> None:
        if (self.budget > 0) == (self.steps > 0):
            raise ValueError(f"budget {self.budget} and steps {self.steps}: exactly one must be above 0")
        if len(self.sides) != len(self.shares) or not self.sides:
            raise ValueError(f"sides {self.sides} and shares {self.shares} must be as many, and at least one")
        if list(self.shares) != sorted(self.shares) or self.shares[-1] != 1 or self.shares[0] <= 0:
            raise ValueError(f"shares {self.shares} must rise from above 0 to 1")
        for side in self.sides:
            if side < PATCH or SIDE % side:
                raise ValueError(f"side {side} does not divide {SIDE}: pass 256, 128, 64 or 32")
        for name in ("tokens", "lr", "warmup", "spread", "heads", "double", "single", "text"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number above 0")
        for name in ("ema", "dropped", "decay_from", "mixed"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number from 0 to below 1")

    def side(self, done: float) -> int:
        """Side in pixels at a part of the budget."""
        return next((side for side, share in zip(self.sides, self.shares, strict=True) if done < share), self.sides[-1])

    def side_of_step(self, done: float, step: int) -> int:
        """Side in pixels of a step: the stage's, or now and then a smaller one; the same on every device."""
        side = self.side(done)
        smaller = [each for each in self.sides if each < side]
        chance = random.Random(self.seed * 1_000_003 + step)
        return chance.choice(smaller) if smaller and chance.random() < self.mixed else side

    def batch(self, side: int) -> int:
        """Pictures of a step on each device."""
        count = self.tokens // ((side // PATCH) ** 2 + TOKENS)
        return max(1, count if count < EVEN else count - count % EVEN)

    def rate(self, done: float, since_restart: int) -> float:
        """Learning rate: up at every restart, flat, then down to 1 % along a cosine."""
        late = min(max(done - self.decay_from, 0.0) / (1 - self.decay_from), 1.0)
        fall = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * late))
        return self.lr * fall * min(1.0, (since_restart + 1) / self.warmup)

    def model(self) -> EmojiModel:
        """An untrained model."""
        torch.manual_seed(self.seed)
        return EmojiModel(self.heads, self.double, self.single, self.text)


# What the weights so far do not depend on: a run may go on with other values.
CHANGEABLE = {f.name for f in fields(Config)} - {"heads", "double", "single", "text"}


@dataclass(slots=True)
class Progress:
    """Where a run stands: steps and seconds of training, pictures seen, and the step of the last restart."""

    step: int = 0
    seconds: float = 0.0
    pictures: int = 0
    restart: int = 0

    def done(self, config: Config) -> float:
        """Part of the budget that is used."""
        return self.seconds / config.budget if config.budget else self.step / config.steps


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures [B, 3, H, W] from -1 to 1, noise of that shape, noise levels [B], token ids [B, TOKENS]."""

    clean: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, index: int, parts: int) -> Batch:
        """One of several parts of the batch."""
        return Batch(*(value.tensor_split(parts)[index] for value in (self.clean, self.noise, self.sigma, self.ids)))


def draw(pack: Pack, weights: torch.Tensor, side: int, count: int, config: Config, seed: int) -> Batch:
    """A batch that depends on the seed alone.

    Args:
        pack: Pictures, on the device where the batch is to be.
        weights: [N] of the pictures.
        side: Of the pictures, in pixels.
        count: Of the pictures.
        config: Settings.
        seed: Of this batch.
    """
    device = pack.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    variant = torch.randint(pack.tokens.shape[1], (count,), generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < config.dropped
    ids = torch.where(dropped[:, None], pack.null, pack.tokens[index, variant])
    logits = torch.randn(count, generator=generator, device=device) * config.spread + math.log(time_shift(side))
    # The transformer reads the level in bfloat16 under autocast: let the noise be of that level.
    sigma = logits.sigmoid().bfloat16().float()
    clean = to_side(pack.pixels[index], side)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    return Batch(clean, noise, sigma, ids)


def to_side(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 pictures [B, 3, SIDE, SIDE] as float32 of a side, from -1 to 1."""
    return F.avg_pool2d(pixels.float(), pixels.shape[-1] // side) / 127.5 - 1


def loss_of(model: EmojiModel, batch: Batch) -> torch.Tensor:
    """Mean square error [B] of the velocity that the predicted clean picture implies."""
    condition = encode_tokens(model.text_encoder, batch.ids, 0)
    mixed = torch.lerp(batch.clean, batch.noise, batch.sigma[:, None, None, None])
    predicted = predict_clean(model.transformer, mixed, batch.sigma, condition, SIDE / batch.clean.shape[-1])
    error = (predicted.float() - batch.clean).square().mean((1, 2, 3))
    return error / batch.sigma.clamp(min=LEAST_NOISE).square()


@torch.no_grad()
def losses_by_split(model: EmojiModel, pack: Pack, side: int, config: Config, count: int = 128) -> dict[str, float]:
    """Mean loss on fixed pictures, noise and levels of each split, with plain captions."""
    found = {}
    chunk = max(EVEN, config.batch(side) // 2)
    for split in dict.fromkeys(each.split for each in pack.pictures):
        batch = draw(pack, pack.weights(split).to(pack.pixels.device), side, count, config, 12345)
        parts = -(-count // chunk)
        losses = torch.cat([loss_of(model, batch.part(i, parts)) for i in range(parts)])
        found[split] = losses.mean().item()
    return found


def save_parts(stem: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> list[Path]:
    """Writes tensors in float16 as STEM-0.safetensors and so on, each at most FILE_BYTES.

    Every file carries `about` and how many there are; files of an older, longer set are removed.
    """
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        half = value.detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(half).all():
            raise ValueError(f"{name} is not finite in float16: the training has diverged")
        if size + half.nbytes > FILE_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = half
        size += half.nbytes
    paths = [stem.with_name(f"{stem.name}-{i}.safetensors") for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        with written_whole(path) as temporary:
            save_file(part, temporary, {"about": json.dumps(dict(about)), "parts": str(len(parts))})
    for old in set(stem.parent.glob(f"{stem.name}-*.safetensors")) - set(paths):
        old.unlink()
    return paths


def load_parts(stem: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_parts` wrote: float32 tensors and `about`.

    Raises:
        ValueError: If a file is missing or belongs to another set.
    """
    tensors: dict[str, torch.Tensor] = {}
    first, count, index = None, 1, 0
    while index < count:
        path = stem.with_name(f"{stem.name}-{index}.safetensors")
        if not path.is_file():
            raise ValueError(f"{path} does not exist: a checkpoint of {count} files needs all of them")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors |= {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        if first is not None and metadata != first:
            raise ValueError(f"{path} is of another checkpoint than {stem.name}-0.safetensors: carry files of one run")
        first, count, index = metadata, int(metadata["parts"]), index + 1
    assert first is not None
    return tensors, json.loads(first["about"])


def load_exported(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a pipeline folder, under the names of `weights_of`."""
    files = {
        "transformer": folder / "transformer" / "diffusion_pytorch_model.safetensors",
        "text_encoder": folder / "text_encoder" / "model.safetensors",
    }
    return {f"{part}.{k}": v.float() for part, file in files.items() for k, v in load_file(file).items()}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, each once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives a model the weights of `weights_of`.

    Raises:
        ValueError: If they are not the model's.
    """
    own = weights_of(model)
    other = sorted(set(own) ^ set(weights)) or [name for name in own if own[name].shape != weights[name].shape]
    if other:
        raise ValueError(f"the weights are of another model: {other[0]} differs")
    for name, value in own.items():
        value.copy_(weights[name])


def about(config: Config, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {"config": asdict(config), "progress": asdict(progress)}


def check_same(config: Config, saved: Mapping[str, Any]) -> Progress:
    """Where the saved run stands.

    Raises:
        ValueError: If its model has another shape.
    """
    then, now = saved["config"], asdict(config)
    other = [f"{k} {then[k]!r} then, {now[k]!r} now" for k in now if k not in CHANGEABLE and then[k] != now[k]]
    if other:
        raise ValueError(f"the checkpoint is of another model ({'; '.join(other)}): pass what it was started with")
    return Progress(**saved["progress"])
