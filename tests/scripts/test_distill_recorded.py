"""Recorded steps of a distillation: what is recorded, copied and replayed, with a stand-in for CUDA and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from scripts.distill.recorded import WARM_UP, Recorded


@dataclass(frozen=True)
class Some:
    """A batch: [4, 3] tensors."""

    x: torch.Tensor
    more: dict[str, Any]


def batch_of(seed: int, device: str = "cpu", alike: torch.Tensor | None = None) -> Some:
    made = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 4, 3, generator=made).to(device)
    return Some(x, {"text": [y], "scale": 2.0} | ({} if alike is None else {"alike": alike}))


def step_of(model: nn.Module) -> tuple[Callable[[Sequence[Some]], dict[str, torch.Tensor]], list[int]]:
    """Forward and backward of a model, and a list that grows by each that runs."""
    ran: list[int] = []

    def gradients(batches: Sequence[Some]) -> dict[str, torch.Tensor]:
        ran.append(len(batches))
        losses = [(model(each.x) - each.more["scale"] * each.more["text"][0]).square().mean() for each in batches]
        total = sum(losses, torch.zeros((), device=losses[0].device))
        total.backward()
        return {"loss": total.detach()}

    return gradients, ran


def expected(model: nn.Module, batches: Sequence[Some]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    losses = [(model(each.x) - each.more["scale"] * each.more["text"][0]).square().mean() for each in batches]
    total = sum(losses, torch.zeros((), device=losses[0].device))
    return total.detach(), list(torch.autograd.grad(total, list(model.parameters())))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """CUDA graphs whose capture runs once, and whose replay runs the same function and fills the captured tensors."""
    state: dict[str, Any] = {"broken": False, "captures": 0}

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            state["replay"]()

    @contextmanager
    def graph(made: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        if state["broken"]:
            raise RuntimeError("operation not permitted\nlong")
        state["captures"] += 1
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    yield state


def test_later_steps_of_a_phase_are_replays_on_their_own_batches(no_cuda: dict[str, Any]) -> None:
    model = nn.Linear(3, 3)
    gradients, ran = step_of(model)
    recorded = Recorded(gradients, list(model.parameters()))
    held: list[Any] = []

    def replay() -> None:
        # What a graph does: the very tensors of the recorded step get the values of this one.
        total, grads = expected(model, recorded._batches)
        recorded._figures["loss"].copy_(total)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(grad)
        held.append([parameter.grad for parameter in model.parameters()])

    no_cuda["replay"] = replay
    # What all batches share is never written: who knows it by its version would read it again.
    alike = torch.ones(3)
    for step in range(WARM_UP + 3):
        batches = [batch_of(2 * step, alike=alike), batch_of(2 * step + 1, alike=alike)]
        total, grads = expected(model, batches)
        figures = recorded.run(batches, "first")
        torch.testing.assert_close(figures["loss"], total)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        assert recorded.replays == (step >= WARM_UP)
        if not recorded.replays:
            model.zero_grad()
    # The first replay on another batch is compared with that step itself.
    assert len(ran) == WARM_UP + 2 and no_cuda["captures"] == 1
    assert all(a is b for a, b in zip(held[0], held[-1], strict=True))
    assert alike._version == 0
    recorded.run([batch_of(0), batch_of(1)], "second")
    assert not recorded.replays and len(ran) == WARM_UP + 3


def test_replays_that_are_not_the_step_are_given_up(
    no_cuda: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(3, 3)
    gradients, _ = step_of(model)
    recorded = Recorded(gradients, list(model.parameters()))
    no_cuda["replay"] = lambda: None
    for step in range(WARM_UP + 3):
        total, grads = expected(model, [batch_of(step)])
        found = recorded.run([batch_of(step)], 0)
        assert recorded.replays == (step == WARM_UP)
        # What is recorded of the first batch is right for that one.
        torch.testing.assert_close(found["loss"], total)
        torch.testing.assert_close(model.weight.grad, grads[0])
        if not recorded.replays:
            model.zero_grad()
    assert capsys.readouterr().err.count("a replay differs from the step itself") == 1


def test_steps_that_cannot_be_recorded_run_as_they_are(
    no_cuda: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    no_cuda["broken"] = True
    model = nn.Linear(3, 3)
    gradients, ran = step_of(model)
    recorded = Recorded(gradients, list(model.parameters()))
    for step in range(WARM_UP + 2):
        total, grads = expected(model, [batch_of(step)])
        torch.testing.assert_close(recorded.run([batch_of(step)], 0)["loss"], total)
        torch.testing.assert_close(model.weight.grad, grads[0])
        assert not recorded.replays
        model.zero_grad()
    assert len(ran) == WARM_UP + 2
    said = capsys.readouterr().err
    assert said.count("cannot be recorded as a CUDA graph") == 1 and "long" not in said


@pytest.mark.gpu
def test_replays_on_a_gpu_are_the_steps_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)).cuda()
    gradients, ran = step_of(model)
    recorded = Recorded(gradients, list(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for step in range(WARM_UP + 4):
        batches = [batch_of(step, "cuda")]
        total, grads = expected(model, batches)
        torch.testing.assert_close(recorded.run(batches, 0)["loss"], total)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        optimizer.step()
        if not recorded.replays:
            optimizer.zero_grad()
    assert recorded.replays and len(ran) == WARM_UP + 2
