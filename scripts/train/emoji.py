"""Trains the embedded "emoji" model: text to image with FLUX.1's architecture, about 25 minutes on a data-centre GPU.

    python -m scripts.train.emoji_data                      # fetches and packs the pictures, once
    python -m scripts.train.emoji --out out/emoji --budget 1300 --seconds 540 --device cuda
    python -m scripts.train.emoji --out out/emoji-2 --resume out/emoji --budget 1300 --seconds 540 --device cuda
    python -m scripts.train.emoji --out out/emoji-3 --resume pipelines/embedded/weights/emoji --device cuda ...
    python -m scripts.train.emoji --out out/emoji-2 --export-only   # writes out/emoji-2/emoji, the pipeline folder

`--budget` is the training time of all commands together, which the schedule follows; `--seconds` is the time of this
command from its start. `--out` gets `state-*.safetensors` (float16 weights to go on from), `average-*.safetensors` (the
averaged weights that ship), `samples.png` and `log.json`. Optimizers start anew, with a warm-up, where a run goes on:
their memory is some tens of steps, and without it a checkpoint is small enough to travel.

Several GPUs: `torchrun --standalone --nproc-per-node 2 -m scripts.train.emoji ...`; each has a batch of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch._inductor.config
import torch.distributed as dist

from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN
from scripts.train.emoji_data import Pack, load_pack, load_tokenizer
from scripts.train.emoji_model import build_pipeline, export
from scripts.train.emoji_optimizer import Guard, build_optimizers
from scripts.train.emoji_training import (
    Batch,
    Config,
    Progress,
    about,
    check_same,
    draw,
    load_exported,
    load_parts,
    loss_of,
    losses_by_split,
    save_parts,
    set_weights,
    weights_of,
)

STATE, AVERAGE, EXPORT = "state", "average", "emoji"
SAVE_EVERY = 150.0
LOG_EVERY = 50
MOST_PARTS = 16
CUDNN_FROM = 128
SAMPLES = {TRAIN: 24, NEW_PAIR: 12, NEW_EMOJI: 12}
FREE_PROMPTS = (
    "a red apple, 3d",
    "a blue apple, 3d",
    "a green heart, flat",
    "a cat astronaut, 3d",
    "rocket, high contrast",
    "a slice of pizza, 3d",
    "smiling cat, gradient",
    "a purple dog, 3d",
)
COLUMNS = 8


class Training:
    """One run: the model, its average, the optimizers and where it stands.

    Args:
        config: Settings.
        pack: The data, on the device of the training.
        resume: Folder with a checkpoint to go on from, or an exported pipeline to start anew from.
        compiled: Whether to compile the blocks.
        cudnn: Whether cuDNN computes the attention of large pictures on a GPU.
    """

    def __init__(
        self, config: Config, pack: Pack, resume: Path | None = None, compiled: bool = False, cudnn: bool = False
    ) -> None:
        self.cudnn = cudnn
        self.config, self.pack, self.device = config, pack, pack.pixels.device
        self.weights = pack.weights(TRAIN).to(self.device)
        self.model = config.model().to(self.device)
        self.progress = Progress()
        if resume is not None and (resume / "model_index.json").is_file():
            set_weights(self.model, load_exported(resume))
        elif resume is not None:
            weights, saved = load_parts(resume / STATE)
            self.progress = check_same(config, saved)
            set_weights(self.model, weights)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.parts = 1
        if compiled:
            compile_blocks(self.model.transformer)
        self.restart()

    def restart(self) -> None:
        """What a checkpoint does not hold starts anew; weights are rounded as it holds them."""
        for value in weights_of(self.model).values():
            value.copy_(value.half())
        set_weights(self.average, weights_of(self.model))
        self.optimizers = build_optimizers(self.model, self.config.lr, self.config.weight_decay)
        self.guard = Guard(self.model.parameters())
        self.progress.restart = self.progress.step

    def step(self) -> torch.Tensor:
        """Runs one step; returns the loss on the device."""
        config, progress = self.config, self.progress
        side = config.side_of_step(progress.done(config), progress.step)
        seed = (config.seed * 1_000_003 + progress.step) * 64 + self.rank
        batch = draw(self.pack, self.weights, side, config.batch(side), config, seed)
        if self.device.type == "cuda":
            # At 64 pixels ([928, 3, 288, 64], bfloat16) cuDNN's backward is an illegal memory access with torch 2.11.
            cudnn = self.cudnn and side >= CUDNN_FROM
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            torch.backends.cuda.enable_flash_sdp(not cudnn)
        loss = self._gradients(batch)
        self._reduce()
        self.guard()
        rate = config.rate(progress.done(config), progress.step - progress.restart)
        parameters = list(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.pictures += len(batch) * self.ranks
        self._move_average()
        return loss

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Mean loss of the batch and its gradients, in more parts where memory does not suffice."""
        while True:
            try:
                total = torch.zeros((), device=self.device)
                for i in range(self.parts):
                    part = batch.part(i, self.parts)
                    with autocast(self.device):
                        loss = loss_of(self.model, part).sum() / len(batch)
                    loss.backward()
                    total += loss.detach()
                return total
            except torch.cuda.OutOfMemoryError:
                if self.parts >= min(MOST_PARTS, len(batch)):
                    raise
            self.parts *= 2
            for parameter in self.model.parameters():
                parameter.grad = None
            torch.cuda.empty_cache()

    def _reduce(self) -> None:
        """Averages the gradients over all devices."""
        if self.ranks == 1:
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        for gradient, value in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(value.view_as(gradient))

    @torch.no_grad()
    def _move_average(self) -> None:
        since = self.progress.step - self.progress.restart
        decay = min(self.config.ema, (1 + since) / (10 + since))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def save(self, out: Path) -> None:
        """Writes the checkpoint and the averaged weights."""
        save_parts(out / STATE, weights_of(self.model), about(self.config, self.progress))
        save_parts(out / AVERAGE, weights_of(self.average), about(self.config, self.progress))

    def losses(self) -> dict[str, float]:
        """Losses of the averaged weights on pictures of each split."""
        side = self.config.side(self.progress.done(self.config))
        with autocast(self.device):
            return losses_by_split(self.average, self.pack, side, self.config)

    def samples(self, steps: int = 24, guidance: float = 3.0) -> PIL.Image.Image:
        """A sheet of samples of the averaged weights: seen pictures, new pairs, new emoji, free prompts."""
        side = self.config.side(self.progress.done(self.config))
        pipeline = build_pipeline(self.average, self.pack.tokenizer)
        rows = []
        prompts = sample_prompts(self.pack)
        for start in range(0, len(prompts), COLUMNS):
            generator = torch.Generator().manual_seed(start)
            with autocast(self.device):
                made: Any = pipeline(
                    prompts[start : start + COLUMNS],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=side,
                    width=side,
                    generator=generator,
                    output_type="pt",
                )
            pictures = made.images.float().cpu()
            rows.append(torch.cat([*pictures, *[torch.ones_like(pictures[0])] * (COLUMNS - len(pictures))], dim=-1))
        sheet = torch.cat(rows, dim=-2)
        return PIL.Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())


def compile_blocks(transformer: Any) -> None:
    """Compiles the blocks, each kind once for each size, and leaves attention and its choice of a kernel out.

    Not the default: on an H200 with torch 2.11 the compiled backward pass writes where it must not (docs/emoji.md).
    """
    from diffusers.models.transformers import transformer_flux

    torch._dynamo.config.recompile_limit = 32
    reductions: Any = torch._inductor.config.triton
    if hasattr(reductions, "mix_order_reduction"):
        reductions.mix_order_reduction = False
    module: Any = transformer_flux
    module.dispatch_attention_fn = torch._dynamo.disable(module.dispatch_attention_fn)
    transformer.compile_repeated_blocks(dynamic=False)


def sample_prompts(pack: Pack) -> list[str]:
    """Prompts of the sample sheet, evenly over each split of the pack; the same for every run."""
    found = []
    for split, count in SAMPLES.items():
        of = [pack.pictures[i].caption for i in pack.of(split).tolist() if pack.pictures[i].weight == 1]
        stride = max(1, len(of) // count)
        found += of[stride // 2 :: stride][:count]
    return [*found, *FREE_PROMPTS]


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def run(
    training: Training,
    out: Path,
    seconds: float,
    started: float,
    report: Callable[[str], None] = print,
    sample_steps: int = 24,
) -> list[dict[str, Any]]:
    """Trains until the budget or this command's seconds are used; writes everything; returns the log.

    Args:
        training: The run.
        out: Folder for all output.
        seconds: Of this command, counted from `started`.
        started: Of `time.monotonic`.
        report: Gets a line for each entry of the log.
        sample_steps: Denoising steps of the sample sheet.
    """
    config, progress, log = training.config, training.progress, []
    started, saved = _agreed(started, training), _agreed(time.monotonic(), training)
    before = saved
    losses: list[torch.Tensor] = []
    while True:
        now = _agreed(time.monotonic(), training)
        progress.seconds += now - before
        before = now
        if progress.done(config) >= 1 or now - started >= seconds:
            break
        losses.append(training.step())
        if len(losses) == LOG_EVERY:
            log.append(_entry(training, losses))
            losses = []
            if training.rank == 0:
                report(json.dumps(log[-1]))
        if training.rank == 0 and now - saved > SAVE_EVERY:
            training.save(out)
            saved = now
    if losses:
        log.append(_entry(training, losses))
    if training.rank == 0:
        training.save(out)
        log.append({"event": "end"} | asdict(progress) | {"losses": training.losses(), "parts": training.parts})
        report(json.dumps(log[-1]))
        (out / "log.json").write_text(json.dumps({"config": asdict(config), "log": log}, indent=1))
        training.samples(sample_steps).save(out / "samples.png")
    return log


def _agreed(now: float, training: Training) -> float:
    """The first device's time on every device, so that all end a stage and the run in the same step."""
    if training.ranks == 1:
        return now
    value = torch.tensor([now], dtype=torch.float64)
    dist.broadcast(value, 0)
    return value.item()


def _entry(training: Training, losses: list[torch.Tensor]) -> dict[str, Any]:
    config, progress = training.config, training.progress
    done, loss = progress.done(config), torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} after {progress.step} steps: go on from a checkpoint with a smaller --lr")
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "pictures": progress.pictures,
        "side": config.side(done),
        "loss": round(loss, 5),
        "lr": config.rate(done, progress.step - progress.restart),
        "dropped": training.guard.dropped.item(),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: one option for each field of `Config`, and where and how to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        default: Any = field.default
        several: dict[str, Any] = {"nargs": "+"} if isinstance(default, tuple) else {}
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, **several)
    parser.add_argument("--data", type=Path, default=Path("out/emoji-data"), help="folder of the pack")
    parser.add_argument("--data-side", type=int, default=256, help="side of the pictures in memory, in pixels")
    parser.add_argument("--out", type=Path, default=Path("out/emoji"))
    parser.add_argument(
        "--resume", type=Path, help="folder with a checkpoint to go on from, or a pipeline to start from"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this command, from its start")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the blocks: faster, wrong with torch 2.11")
    parser.add_argument("--cudnn", action="store_true", help="attention by cuDNN: two thirds of flash attention's time")
    parser.add_argument("--export-only", action="store_true", help="make a pipeline of the averaged weights in --out")
    return parser.parse_args(arguments)


def export_average(options: argparse.Namespace) -> int:
    """Makes the pipeline folder of the averaged weights in --out; returns its size in bytes."""
    weights, saved = load_parts(options.out / AVERAGE)
    shape = {name: saved["config"][name] for name in ("heads", "double", "single", "text")}
    model = Config(**shape).model()
    set_weights(model, weights)
    return export(model.state_dict(), model, load_tokenizer(options.data), options.out / EXPORT)


def train(options: argparse.Namespace, started: float) -> list[dict[str, Any]]:
    """Sets everything up and trains; returns the log.

    Raises:
        ValueError: If options, data and checkpoint do not go together.
    """
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(Config)}
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    config = Config(**values)
    if max(config.sides) > options.data_side:
        raise ValueError(f"sides {config.sides} need pictures of that side: pass --data-side {max(config.sides)}")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    options.out.mkdir(parents=True, exist_ok=True)
    pack = load_pack(options.data, device, options.data_side)
    training = Training(config, pack, options.resume, options.compile, options.cudnn)
    try:
        return run(training, options.out, options.seconds, started, lambda line: print(line, flush=True))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    try:
        if options.export_only:
            size = export_average(options)
            print(f"{size / 1e6:.2f} MB exported to {options.out / EXPORT}")
        else:
            train(options, started)
    except ValueError as error:
        raise SystemExit(f"emoji: {error}") from error


if __name__ == "__main__":
    main()
