"""Trains the judge of the emoji models: a dual encoder of real emoji and their captions.

    python -m scripts.measure.emoji_encoder --data out/emoji-data --out out/emoji-encoder.safetensors --device cuda

It has to name what the models draw for captions that they never saw, so it learns from all real pictures, held-out ones
included; it never sees a generated one. Beside the weights it measures itself: how often the right one of 100 captions
is the first for augmented real pictures, the most that a model's pictures can reach. Needs the pack of
scripts.train.emoji_data. The file is written when training ends; an interrupted run leaves none.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from scripts import cli
from scripts.measure.emoji_augment import augment, may_mirror
from scripts.measure.emoji_encoder_model import SIDE, DualEncoder, check_tokens, load_encoder, save_encoder
from scripts.measure.emoji_prompts import CAPTIONS, choose
from scripts.train.emoji_captions import SPLITS, digest
from scripts.train.emoji_data import Pack, load_pack
from scripts.train.flow_loop import autocast

WARMUP = 0.03  # part of the training
AVERAGE = 0.998
REPEATS = 4  # augmented pictures of each caption, when the judge is measured
LOG_EVERY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one training.

    Attributes:
        seconds: Of training; 0: as many steps as `steps` says, the same on every machine of one kind.
        steps: Steps where there are no seconds.
        batch: Pictures of a step.
        lr: Learning rate at its peak.
        weight_decay: Of the matrices.
        seed: Of everything random.
    """

    seconds: float = 240.0
    steps: int = 0
    batch: int = 1024
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.seconds > 0) == (self.steps > 0):
            raise ValueError(f"seconds {self.seconds} and steps {self.steps}: exactly one must be above 0")
        if self.batch < 2 or self.lr <= 0:
            raise ValueError(f"batch {self.batch} must be at least 2 and lr {self.lr} above 0")


class Training:
    """A training of the encoder; the same batches for the same seed.

    Args:
        pack: The real pictures, on the device of the training, at any side.
        settings: Settings.
    """

    def __init__(self, pack: Pack, settings: Settings) -> None:
        self.pack, self.settings, self.device = pack, settings, pack.pixels.device
        torch.manual_seed(settings.seed)
        self.encoder = DualEncoder().to(self.device)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        matrices = [each for each in self.encoder.parameters() if each.ndim > 1]
        others = [each for each in self.encoder.parameters() if each.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
        self.weights = pack.weights(*SPLITS).to(self.device)
        self.mirror = torch.tensor([may_mirror(each.caption) for each in pack.pictures], device=self.device)
        self.batch = min(settings.batch, len(pack.pictures))
        self.done = 0

    def step(self, part: float) -> torch.Tensor:
        """Runs one step at a part of the budget, 0 to 1; returns the loss on the device."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed * 1_000_003 + self.done)
        index = torch.multinomial(self.weights, self.batch, generator=generator)
        variant = torch.randint(self.pack.tokens.shape[1], (self.batch,), generator=generator, device=self.device)
        ids = self.pack.tokens[index, variant]
        pictures = augment(self.pack.pixels[index].float() / 255, self.mirror[index], SIDE, generator)
        with autocast(self.device):
            logits = self.encoder.logits(pictures, ids)
        loss = contrastive(logits, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        cosine = 0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * part))
        rate = self.settings.lr * cosine * min(1.0, (part + 1e-3) / WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        decay = min(AVERAGE, self.done / (10 + self.done))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.encoder.parameters()), 1 - decay)
        return loss.detach()

    def run(self, report: Callable[[str], None] = print) -> float:
        """Trains; returns the seconds that it took."""
        start = time.monotonic()
        settings = self.settings
        while True:
            seconds = time.monotonic() - start
            part = seconds / settings.seconds if settings.seconds else self.done / settings.steps
            if part >= 1:
                return seconds
            loss = self.step(part)
            if self.done % LOG_EVERY == 0:
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(f"the loss is {value} after {self.done} steps: pass a smaller --lr")
                report(json.dumps({"step": self.done, "seconds": round(seconds, 1), "loss": round(value, 4)}))


def contrastive(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over pictures and captions; equal captions of other pictures are no wrong answers."""
    same = (ids[:, None] == ids[None]).all(-1)
    same.fill_diagonal_(False)
    logits = logits.float().masked_fill(same, -math.inf)
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def limit(encoder: DualEncoder, pack: Pack, count: int = CAPTIONS, seed: int = 0) -> dict[str, dict[str, float | int]]:
    """How the judge names augmented real pictures of captions that the models saw in training, and of held-out ones.

    Returns:
        By "seen" and "unseen": captions, pictures, top1 and top5, the shares with the right caption among all.
    """
    found = {}
    device = pack.pixels.device
    for kind, chosen in choose(pack, count).items():
        index = torch.tensor(chosen)
        mirror = torch.tensor([may_mirror(pack.pictures[i].caption) for i in chosen], device=device)
        ranks = []
        for repeat in range(REPEATS):
            generator = torch.Generator(device).manual_seed(seed + 7919 * (repeat + 1))
            pictures = augment(pack.pixels[index].float() / 255, mirror, SIDE, generator)
            ranks.append(encoder.ranks(pictures, pack.plain[index]))
        rank = torch.cat(ranks)
        found[kind] = {"captions": len(chosen), "pictures": len(rank), "top1": share(rank < 1), "top5": share(rank < 5)}
    return found


def share(right: torch.Tensor) -> float:
    """Part of True."""
    return round(right.double().mean().item(), 4)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/emoji-data"), help="folder of the pack")
    parser.add_argument("--out", type=Path, default=Path("out/emoji-encoder.safetensors"))
    parser.add_argument("--seconds", type=cli.number, default=Settings.seconds, help="of training; 0: see --steps")
    parser.add_argument("--steps", type=int, default=0, help="with --seconds 0: so many steps")
    parser.add_argument("--batch", type=cli.count, default=1024, help="pictures of a step")
    parser.add_argument("--lr", type=cli.number, default=1.5e-3)
    parser.add_argument("--captions", type=cli.count, default=CAPTIONS, help="of each kind, when it measures itself")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--measure-only", action="store_true", help="measure the encoder that --out names")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains, measures and writes the encoder, or only measures it; returns what the file says about itself."""
    torch.set_num_threads(options.threads)
    names = ("seconds", "steps", "batch", "lr", "seed")
    settings = Settings(**{name: getattr(options, name) for name in names})
    pack = load_pack(options.data, options.device, SIDE)
    if options.measure_only:
        encoder, about = load_encoder(options.out, options.device)
        check_tokens(about, pack.tokenizer)
        return about | {"limit": limit(encoder, pack, options.captions)}
    training = Training(pack, settings)
    seconds = training.run(lambda line: print(line, flush=True))
    device = torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu"
    about = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "device": device,
        "trained_seconds": round(seconds, 1),
        "steps": training.done,
        "pictures": training.done * training.batch,
        "real_pictures": len(pack.pictures),
        "tokenizer": digest(pack.tokenizer),
        "limit": limit(training.average, pack, options.captions),
    }
    about["bytes"] = save_encoder(training.average, options.out, about)
    return about


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("emoji_encoder"):
        print(json.dumps(train(options), indent=1))


if __name__ == "__main__":
    main()
