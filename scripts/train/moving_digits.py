"""Trains the embedded "moving-digits" video model: minutes on a data-centre GPU, many hours on a CPU.

    python -m scripts.train.moving_digits --out runs/moving-digits --minutes 5 --device cuda

Stop it at any time; the same command goes on from the last checkpoint. `--out` gets `checkpoint.safetensors`,
`log.jsonl`, `samples/*.png` and at the end `moving-digits/`, the pipeline folder that the package ships.

The coarse stage sees clips of 4 and 8 frames (1024 and 2048 tokens), where a step costs less for as many pictures;
the finishing stage sees 16 frames (4096 tokens) and runs every other step with a pattern, so that the weights are good
for dense attention and for the patterns. `--start moving-digits --steps 0` goes on from the weights that are shipped.
"""

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional as F

from scripts import cli
from scripts.train.digits import attention_of, run
from scripts.train.digits_training import (
    CLASSES,
    NULL_LABEL_DROPOUT,
    load_checkpoint,
    save_checkpoint,
    step_generator,
    update,
)
from scripts.train.moving_digits_data import MovingDigits
from scripts.train.moving_digits_training import (
    CLASS_TOKENS,
    FRAMES,
    SIZE,
    TIME_SHIFT,
    Config,
    Progress,
    build_model,
    build_pipeline,
    export,
)
from visattn import apply
from visattn.environment import chosen_device
from visattn.pipelines.embedded import embedded_models, load_embedded
from visattn.pipelines.embedded.pixel_wan import PixelWanPipeline, class_words

EXPORT = "moving-digits"
LORA_FILE = "pytorch_lora_weights.safetensors"


class Training:
    """One run: the model, its average, the optimizer and where it stands.

    Args:
        config: Settings.
        out: Folder for all output; it holds the checkpoint that a resumed run starts from.
        device: Device of the model.
        resume: Whether to go on from a checkpoint in `out`.
        backend: Backend of the pattern in finishing steps.
        compiled: Whether to compile the blocks, which pays after some hundred steps on a GPU.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        device: str = "cpu",
        resume: bool = True,
        backend: str = "auto",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out, self.device, self.backend = config, out, torch.device(device), backend
        self.compiled = compiled
        model: Any = build_model(config.layers)
        if config.start:
            model.load_state_dict(load_pipeline(config.start).transformer.state_dict())
        self.model: WanTransformer3DModel = model.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=self.device.type == "cuda",
        )
        self.batches = MovingDigits(self.device, config.augment)
        self.progress = Progress()
        self.checkpoint = out / "checkpoint.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.is_file():
            done = load_checkpoint(self.checkpoint, config, self.model, self.ema, self.optimizer)
            self.progress = Progress(**asdict(done))

    def save(self) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.checkpoint, self.config, self.progress, self.model, self.ema, self.optimizer)

    def step(self) -> dict[str, Any]:
        """Runs one step and returns its figures for the log."""
        start, config, progress = time.perf_counter(), self.config, self.progress
        frames = progress.frames(config)
        generator = step_generator(config.seed, progress.step)
        batch = max(1, config.batch * (FRAMES // 2) // frames)
        videos, labels = self.batches.draw(batch, frames, SIZE, generator)
        pattern = config.finish_pattern(progress.step) if progress.finishing else None
        with self._attention(pattern):
            loss = flow_matching_loss(self.model, videos, labels, generator)
            loss.backward()
        lr = progress.lr(config)
        norm = update(self.model.parameters(), self.optimizer, lr)
        self._average()
        figures = {"frames": frames, "batch": batch, "pattern": pattern or "dense", "loss": loss.item()}
        seconds = time.perf_counter() - start
        progress.step, progress.seconds = progress.step + 1, progress.seconds + seconds
        return figures | {"grad_norm": norm, "lr": lr, "step_s": round(seconds, 3)}

    def _attention(self, pattern: str | None) -> AbstractContextManager[Any]:
        """Context in which the model runs with a pattern, None for dense attention."""
        if not self.compiled or not self.progress.finishing:
            return attention_of(self.model, pattern, self.backend)
        # Dense steps go through the same operator as the others: the blocks are compiled once.
        handle = apply(self.model, pattern or self.config.patterns[0], backend=self.backend, dense_steps=1, strict=True)
        handle.set_step(int(pattern is not None), 2)
        return handle

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged weights; a stage starts with short averages, to forget the weights before it soon."""
        done = self.progress.step - max(self.progress.finish_step, 0)
        decay = min(self.config.ema, (1 + done) / (10 + done))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def export(self) -> int:
        """Writes the averaged weights as a pipeline folder; returns its size in bytes."""
        return export(self.ema, self.out / EXPORT, self.config.layers)

    def picture(self) -> None:
        """Saves a sheet made by the averaged weights: a row of frames for each of the ten digits."""
        save_sheet(build_pipeline(self.ema), self.progress.frames(self.config), SIZE, self.out, self.progress.step)


def save_sheet(pipeline: PixelWanPipeline, frames: int, size: int, out: Path, step: int) -> None:
    """Saves a row of frames for each of the ten digits into `out`/samples, under the number of a step."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output: Any = pipeline(
        list(range(CLASSES)),
        num_frames=frames,
        height=size,
        width=size,
        num_inference_steps=16,
        generator=generator,
        output_type="pt",
    )
    sheet = output.frames.float().cpu().permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    pipeline.video_processor.numpy_to_pil(sheet[None].numpy())[0].save(folder / f"{step:06d}.png")


def load_pipeline(source: str) -> PixelWanPipeline:
    """A pipeline from its folder or by the name of an embedded model, in float32.

    Raises:
        ValueError: If there is neither.
    """
    pipeline: Any
    if source in embedded_models():
        pipeline = load_embedded(source)
    elif (Path(source) / "model_index.json").is_file():
        pipeline = PixelWanPipeline.from_pretrained(source, torch_dtype=torch.float32, local_files_only=True)
    else:
        names = ", ".join(embedded_models())
        raise ValueError(f"{source!r} is no pipeline folder: pass one that has a model_index.json, or {names}")
    if not isinstance(pipeline, PixelWanPipeline):
        raise ValueError(f"{source!r} is a {type(pipeline).__name__}: pass a pipeline that makes videos")
    return pipeline


def load_lora(pipeline: PixelWanPipeline, folder: Path) -> None:
    """Adds the updates that `extend_video.py` wrote to a pipeline's weights."""
    model: Any = pipeline.transformer
    # diffusers would look for a pickle where no name is given.
    model.load_lora_adapter(str(folder), prefix=None, weight_name=LORA_FILE, use_safetensors=True)
    model.fuse_lora()


def flow_matching_loss(
    model: WanTransformer3DModel,
    videos: torch.Tensor,
    labels: torch.Tensor,
    generator: torch.Generator,
    share: slice = slice(None),
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise minus video) at a random time.

    On a GPU the model runs in bfloat16 where autocast allows it.

    Args:
        model: The transformer.
        videos: [B, 1, T, H, W], values -1 to 1.
        labels: [B]; a tenth of them is replaced with the null class.
        generator: CPU generator of times, noise and dropped labels.
        share: Those of the videos that count.
    """
    batch, device = len(videos), videos.device
    noise = torch.randn(videos.shape, generator=generator).to(device)
    t = torch.sigmoid(torch.randn(batch, generator=generator))
    t = (TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t)).to(device)
    dropped = (torch.rand(batch, generator=generator) < NULL_LABEL_DROPOUT).to(device)
    words = class_words(torch.where(dropped, CLASSES, labels), CLASSES, CLASS_TOKENS)
    videos, noise, t, words = videos[share], noise[share], t[share], words[share]
    mixed = torch.lerp(videos, noise, t[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = model(mixed, timestep=t * 1000, encoder_hidden_states=words, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - videos)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: one option for each field of `Config`, and where and how to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=cli.like(field.name, field.default), default=field.default
        )
    parser.add_argument("--out", type=Path, default=Path("runs/moving-digits"))
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--backend", default="auto", help="backend of the pattern in finishing steps")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-minutes", type=cli.number, default=2.0)
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint in --out as it stands")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between sample pictures, 0 for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, report: Callable[[str], None] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    show = report or (lambda line: print(line, flush=True))
    with cli.told("train_moving_digits"):
        chosen_device(options.device)
        config = Config(**{field.name: getattr(options, field.name) for field in fields(Config)})
        torch.set_num_threads(options.threads)
        with cli.only_run(options.out):
            training = Training(config, options.out, options.device, options.resume, options.backend, options.compile)
            if options.export_only:
                size = training.export()
            else:
                size = run(training, options.checkpoint_minutes, options.sample_every, show)
    name = torch.cuda.get_device_name() if training.device.type == "cuda" else f"CPU, {options.threads} threads"
    seconds = training.progress.seconds
    print(f"{training.progress.step} steps, {seconds:.0f} s of steps on {name}, {size / 1e6:.2f} MB exported")


if __name__ == "__main__":
    main()
