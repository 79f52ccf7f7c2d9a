"""The loop of a distillation: steps, averages, checkpoints, and how it stops."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import KwargsHandler
from torch import nn
from torch.nn.utils import clip_grad_norm_

from scripts.cli import only_run
from scripts.distill.learner import Learner, as_trained, round_frozen, write_start
from scripts.distill.log import Log
from scripts.distill.optimizers import build_optimizer, rate_share
from scripts.distill.recorded import Recorded
from scripts.distill.settings import RunConfig
from scripts.distill.sharing import share_weights, whole
from scripts.distill.state import Progress, check_finite, check_resume, load_checkpoint, save_checkpoint
from visattn.trained import save_trained

CHECKPOINT, RESULT = "checkpoint.safetensors", "student.safetensors"


@contextmanager
def prepared(config: RunConfig) -> Iterator[None]:
    """Makes the folder of a run, or checks that the one in it may go on; it is this run's for the length of the block.

    Raises:
        ValueError: If it was started with other settings, cannot be written, or another run has it.
    """
    with only_run(config.out):
        step = check_folder(config)
        if step is not None:
            print(f"going on from step {step}")
        yield


def check_folder(config: RunConfig, unknown: Collection[str] = ()) -> int | None:
    """Steps that are done of a run that may go on, None for one that begins.

    Args:
        config: Settings.
        unknown: Names of those that are not known yet.

    Raises:
        ValueError: If the run in its folder was started with other settings.
    """
    checkpoint = config.out / CHECKPOINT
    return check_resume(checkpoint, config, unknown) if config.resume and checkpoint.is_file() else None


def begin(config: RunConfig) -> Accelerator:
    """Device, mixed precision, threads and the seed of a run.

    Raises:
        ValueError: If CUDA graphs are asked for where there are none.
    """
    # A stage may leave parameters without gradients, which processes wait for unless they are told.
    handlers: list[KwargsHandler] = []
    if config.staged:
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    accelerator = Accelerator(cpu=config.cpu, mixed_precision=config.precision, kwargs_handlers=handlers)
    if config.graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        where = f"{accelerator.num_processes} processes on {accelerator.device.type}"
        raise ValueError(f"--graphs records steps of one process on a CUDA device, these are {where}: leave it out")
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    return accelerator


class Run:
    """One run: a learner, its optimizer, its average and where it stands; a subclass draws the batches.

    Args:
        config: Settings, checked.
        accelerator: From `begin`.
        learner: Teacher and student.
        parts: The parts of a step's batch that this process runs.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, learner: Learner, parts: list[slice]) -> None:
        self.config, self.accelerator, self.learner, self.parts = config, accelerator, learner, parts
        learner.to(accelerator.device)
        self.shared = config.fsdp and accelerator.num_processes > 1
        if self.shared:
            share_weights(learner, accelerator.device)
        self.trained = learner.trained()
        if config.weights is not None:
            write_start(self.trained, config.weights)
        self.optimizer = build_optimizer(self.trained, config)
        if config.precision == "bf16" and not self.shared:
            for model in (learner.teacher, learner.student):
                round_frozen(model)
        self.average = {name: value.detach().clone() for name, value in self.trained.items()} if config.ema else {}
        self.progress = Progress()
        self.checkpoint = config.out / CHECKPOINT
        if config.resume and self.checkpoint.is_file():
            self.progress = load_checkpoint(self.checkpoint, self.trained, self.average, self.optimizer)
        self.wrapped: Any = learner if self.shared else accelerator.prepare(learner)
        # Behind the wrapper, which has to know of all that learns at some time.
        learner.reach(self.done)
        self.recorded = Recorded(self._gradients, list(self.trained.values())) if config.graphs else None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.progress.step

    @property
    def seconds(self) -> float:
        """Seconds of steps."""
        return self.progress.seconds

    def draw(self, part: slice) -> Any:
        """A part of the batch of the coming step, on the device; it depends on seed, step and part alone."""
        raise NotImplementedError

    def picture(self) -> None:
        """Saves a picture of what the averaged student does; none by default."""

    def train_step(self) -> dict[str, Any]:
        """Runs one step and returns its figures for the log."""
        config, start = self.config, time.perf_counter()
        if self.learner.reach(self.done):
            self.progress = self.progress._replace(began=self.step)
        batches = [self.draw(part) for part in self.parts]
        figures = self.recorded.run(batches, self.learner.phase) if self.recorded else self._gradients(batches)
        norm = self._clip()
        share = rate_share(self.step - self.progress.began, self.learner.stage_share(self.done), config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        if self.recorded is None or not self.recorded.replays:
            self.optimizer.zero_grad(set_to_none=True)
        self._average()
        seconds = self.seconds + self._agreed(time.perf_counter() - start)
        self.progress = self.progress._replace(step=self.step + 1, seconds=seconds)
        return {**figures, "gradient": norm, "lr": config.rate * share}

    def _gradients(self, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Runs the batches of a step forward and backward; returns the mean of each loss."""
        config, figures = self.config, {}
        for i, batch in enumerate(batches):
            with self._together(i + 1 == len(batches)):
                losses = self.wrapped(batch)
                total = sum(getattr(config, name) * value for name, value in losses.items()) / len(batches)
                if not (isinstance(total, torch.Tensor) and total.requires_grad):
                    raise ValueError(
                        f"no loss ({', '.join(losses)}) reaches what learns here: give others a weight, or train more"
                    )
                self.accelerator.backward(total)
            for name, value in losses.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / len(batches)
        return figures

    def _clip(self) -> torch.Tensor:
        """Clips the gradients and returns their norm; where that is not finite the step learns nothing."""
        norm = whole(clip_grad_norm_(self.trained.values(), self.config.clip or math.inf))
        if not self.shared:
            # Kernels of bfloat16 give one of thousands of gradients that is not; nobody waits here to look.
            wrong = ~norm.isfinite()
            for parameter in self.trained.values():
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(wrong, 0)
        return norm

    @property
    def done(self) -> float:
        """Share of the run that is over, by steps or by the clock: 1 at its end."""
        limit = self.config.seconds
        return max(self.step / self.config.steps, self.seconds / limit if limit else 0.0)

    def _agreed(self, seconds: float) -> float:
        """The mean over all processes: their learning rates must not differ."""
        if not self.config.seconds or self.accelerator.num_processes == 1:
            return seconds
        mean: Any = self.accelerator.reduce(torch.tensor(seconds, device=self.accelerator.device), "mean")
        return mean.item()

    @contextmanager
    def _together(self, last: bool) -> Iterator[None]:
        """Around a part of a step; processes add up their gradients after the last."""
        if self.shared:
            self.wrapped.set_requires_gradient_sync(last)
            with self.accelerator.autocast():
                yield
            return
        with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            yield

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged weights; the first averages are short, to forget the start soon."""
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            new = [self.trained[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), new, 1 - decay)

    @property
    def result(self) -> dict[str, torch.Tensor]:
        """The trained tensors that count: averaged, unless there is no average."""
        return self.average or {name: value.detach() for name, value in self.trained.items()}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The student with the averaged weights, for as long as the context lasts."""
        kept = {name: value.detach().clone() for name, value in self.trained.items()}
        _fill(self.trained, self.result)
        try:
            yield self.learner.student
        finally:
            _fill(self.trained, kept)

    def save(self) -> None:
        """Writes the checkpoint; every process makes this call."""
        first = self.accelerator.is_main_process
        if first or self.shared:
            given = self.config, self.progress, self.trained, self.average, self.optimizer
            save_checkpoint(self.checkpoint, *given, writes=first)

    def export(self) -> Path:
        """Writes the result; returns its file. Every process makes this call."""
        path = self.config.out / RESULT
        result = {name: whole(value) for name, value in self.result.items()}
        check_finite(result, self.step)
        if self.accelerator.is_main_process:
            save_trained(path, as_trained(result, self.config, self.step))
        return path


def _fill(parameters: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the step that runs is not torn apart; the second one interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def train(run: Run) -> Path:
    """Trains to the end, or until Ctrl-C, and exports; returns the file of the result."""
    config, first = run.config, run.accelerator.is_main_process
    log = Log(config, first, run.step)
    try:
        with stop_request() as stop:
            _steps(run, log, stop)
    finally:
        log.close()
    result = run.export()
    # No process may look at the file before it is there.
    run.accelerator.wait_for_everyone()
    if first:
        stopped = f"stopped after {run.step} of {config.steps} steps, the same command goes on; "
        print(f"{stopped * (run.done < 1)}{result}: {result.stat().st_size / 1e6:.2f} MB", flush=True)
    return result


def _steps(run: Run, log: Log, stop: threading.Event) -> None:
    from tqdm import tqdm

    config, first = run.config, run.accelerator.is_main_process
    every = getattr(config, "sample_every", 0)
    started, start = time.perf_counter(), run.step
    with tqdm(total=config.steps, initial=start, unit="step", disable=None if first else True) as bar:
        while run.done < 1:
            figures = run.train_step()
            step, noted = run.step, run.step % config.log_every == 0 or run.done >= 1
            stopped = _stopped(run, stop, noted)
            last = run.done >= 1 or stopped
            if noted or last:
                plain = _means(run, figures)
                _check_losses(plain, step)
                bar.set_postfix({name: f"{plain[name]:.4f}" for name in plain if name != "lr"})
                speed = (time.perf_counter() - started) / (step - start)
                log.write(step, {name: round(value, 7) for name, value in plain.items()} | {"step_s": round(speed, 4)})
            bar.update()
            if first and every and step % every == 0:
                run.picture()
            if step % config.save_every == 0 or last:
                run.save()
            if last:
                break


def _check_losses(figures: dict[str, float], step: int) -> None:
    """Ends a run that learns nothing any more; gradients may be not finite now and then, and losses not.

    Raises:
        ValueError: If a loss is infinite or no number.
    """
    wrong = [name for name, value in figures.items() if name != "gradient" and not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"--{wrong[0]} is {figures[wrong[0]]} after {step} steps: the training has diverged, or samples or teacher "
            "give no numbers; the last checkpoint stays, begin anew with a lower --lr"
        )


def _stopped(run: Run, stop: threading.Event, noted: bool) -> bool:
    """Whether all processes stop after this step; several of them agree on it only where a line is logged."""
    if run.accelerator.num_processes == 1:
        return stop.is_set()
    if not noted:
        return False
    asked: Any = run.accelerator.reduce(torch.tensor(float(stop.is_set()), device=run.accelerator.device), "sum")
    return asked.item() > 0


def _means(run: Run, figures: dict[str, Any]) -> dict[str, float]:
    """Figures as numbers, means over the processes."""
    values = torch.tensor([float(value) for value in figures.values()], device=run.accelerator.device)
    means: Any = run.accelerator.reduce(values, "mean")
    return dict(zip(figures, means.tolist(), strict=True))
