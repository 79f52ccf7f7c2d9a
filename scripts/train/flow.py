"""Parts of a flow-matching training that predicts clean pictures: settings, where a run stands, batches, the loss."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from scripts.train.emoji_data import Pack

LEAST_NOISE = 0.05
EVEN = 16  # larger batches are multiples of it, so that their parts are alike and compile once
View = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """Settings of one training; the checks run before any work. A subclass adds the model's shape.

    Attributes:
        budget: Seconds of training in all commands together; the schedule follows them. 0: follows `steps`.
        steps: Steps in all, where there is no budget.
        sides: Side in pixels of each stage.
        shares: Part of the budget at which each stage ends, the last at 1.
        mixed: Part of the steps of a stage that are of an earlier one, so that none is forgotten.
        tokens: Tokens of a step on each device.
        lr: Learning rate of both optimizers.
        decay_from: Part of the budget from which the learning rate goes down.
        warmup: Steps at the start and after every restart of the optimizers.
        weight_decay: Of the matrices inside blocks.
        ema: Decay of the average.
        spread: Standard deviation of the noise levels' logits.
        dropped: Share of captions replaced with the empty one.
        seed: Of everything random.
    """

    LARGEST: ClassVar[int] = 256  # side of the data
    PATCH: ClassVar[int] = 4

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

    def __post_init__(self) -> None:
        if (self.budget > 0) == (self.steps > 0):
            raise ValueError(f"budget {self.budget} and steps {self.steps}: exactly one must be above 0")
        if len(self.sides) != len(self.shares) or not self.sides:
            raise ValueError(f"sides {self.sides} and shares {self.shares} must be as many, and at least one")
        if list(self.shares) != sorted(self.shares) or self.shares[-1] != 1 or self.shares[0] <= 0:
            raise ValueError(f"shares {self.shares} must rise from above 0 to 1")
        for side in self.sides:
            if side < self.PATCH or self.LARGEST % side:
                raise ValueError(f"side {side} does not divide {self.LARGEST}: pass {self.LARGEST} or a half of it")
        for name in ("tokens", "lr", "warmup", "spread", *self.shape()):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number above 0")
        for name in ("ema", "dropped", "decay_from", "mixed"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number from 0 to below 1")

    @classmethod
    def shape(cls) -> tuple[str, ...]:
        """Names of the settings that are the model's shape: a run goes on with the same values of them only."""
        raise NotImplementedError

    def model(self) -> Any:
        """An untrained model of this shape."""
        raise NotImplementedError

    def tokens_of(self, stage: int) -> int:
        """Tokens of one sample of a stage."""
        raise NotImplementedError

    def size(self, stage: int) -> dict[str, int]:
        """What the log says of a stage."""
        return {"side": self.sides[stage]}

    def stage(self, done: float) -> int:
        """Stage at a part of the budget."""
        return next((i for i, share in enumerate(self.shares) if done < share), len(self.shares) - 1)

    def stage_of_step(self, done: float, step: int) -> int:
        """Stage of a step: that of the time, or now and then an earlier one; the same on every device."""
        stage = self.stage(done)
        chance = random.Random(self.seed * 1_000_003 + step)
        return chance.randrange(stage) if stage and chance.random() < self.mixed else stage

    def batch(self, stage: int) -> int:
        """Samples of a step on each device."""
        count = self.tokens // self.tokens_of(stage)
        return max(1, count if count < EVEN else count - count % EVEN)

    def rate(self, done: float, since_restart: int) -> float:
        """Learning rate: up at every restart, flat, then down to 1 % along a cosine."""
        late = min(max(done - self.decay_from, 0.0) / (1 - self.decay_from), 1.0)
        fall = 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * late))
        return self.lr * fall * min(1.0, (since_restart + 1) / self.warmup)


@dataclass(slots=True)
class Progress:
    """Where a run stands: steps and seconds of training, samples seen, and the step of the last restart."""

    step: int = 0
    seconds: float = 0.0
    pictures: int = 0
    restart: int = 0

    def done(self, config: FlowConfig) -> float:
        """Part of the budget that is used."""
        return self.seconds / config.budget if config.budget else self.step / config.steps


@dataclass(frozen=True, eq=False)
class Batch:
    """Clean samples [B, ...] from -1 to 1, noise of that shape, noise levels [B], token ids [B, TOKENS]."""

    clean: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, index: int, parts: int) -> Batch:
        """One of several parts of the batch."""
        return Batch(*(value.tensor_split(parts)[index] for value in (self.clean, self.noise, self.sigma, self.ids)))

    def noisy(self) -> torch.Tensor:
        """The samples at their noise levels."""
        return torch.lerp(self.clean, self.noise, self.sigma.reshape(-1, *[1] * (self.clean.ndim - 1)))

    def error(self, predicted: torch.Tensor) -> torch.Tensor:
        """Mean square error [B] of the velocity that the predicted clean samples imply."""
        error = (predicted.float() - self.clean).square().flatten(1).mean(1)
        return error / self.sigma.clamp(min=LEAST_NOISE).square()


def draw_batch(
    pack: Pack, weights: torch.Tensor, view: View, count: int, config: FlowConfig, shift: float, seed: int
) -> Batch:
    """A batch that depends on the seed alone.

    Args:
        pack: Samples, on the device where the batch is to be.
        weights: [N] of the samples.
        view: Makes clean samples of the pack's `pixels`, with a generator for what is random in it.
        count: Of the samples.
        config: Settings.
        shift: Of the noise levels.
        seed: Of this batch.
    """
    device = pack.pixels.device
    generator = torch.Generator(device).manual_seed(seed)
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    variant = torch.randint(pack.tokens.shape[1], (count,), generator=generator, device=device)
    dropped = torch.rand(count, generator=generator, device=device) < config.dropped
    ids = torch.where(dropped[:, None], pack.null, pack.tokens[index, variant])
    logits = torch.randn(count, generator=generator, device=device) * config.spread + math.log(shift)
    # The transformer reads the level in bfloat16 under autocast: let the noise be of that level.
    sigma = logits.sigmoid().bfloat16().float()
    clean = view(pack.pixels[index], generator)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    return Batch(clean, noise, sigma, ids)


def about(config: FlowConfig, progress: Progress) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return {"config": asdict(config), "progress": asdict(progress)}


def check_same(config: FlowConfig, saved: Mapping[str, Any]) -> Progress:
    """Where the saved run stands.

    Raises:
        ValueError: If its model has another shape.
    """
    then, now = saved["config"], asdict(config)
    other = [f"{k} {then[k]!r} then, {now[k]!r} now" for k in config.shape() if then[k] != now[k]]
    if other:
        raise ValueError(f"the checkpoint is of another model ({'; '.join(other)}): pass what it was started with")
    return Progress(**saved["progress"])


def own_fields(cls: type[FlowConfig]) -> tuple[str, ...]:
    """Names of the settings that a subclass adds."""
    shared = {field.name for field in fields(FlowConfig)}
    return tuple(field.name for field in fields(cls) if field.name not in shared)
