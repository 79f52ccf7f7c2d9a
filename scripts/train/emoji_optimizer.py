"""Muon for the matrices inside the blocks, AdamW for everything else.

Muon (Jordan 2024) makes each step of a matrix orthogonal, in Moonlight's form (Liu et al. 2025, "Muon is Scalable for
LLM Training"): steps are scaled to AdamW's usual size, so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Quintic iteration whose slope at 0 is steep: singular values end between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
ADAM_SHARE = 0.5
# What FLUX, T5 and Wan call their lists of blocks.
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "block", "blocks")
SCALE = 0.2  # root mean square of AdamW's usual step, relative to the learning rate


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, for matrices only; those of one shape go together.

    Args:
        parameters: Matrices.
        lr: Learning rate on AdamW's scale.
        momentum: Of Nesterov's form.
        weight_decay: Decoupled, relative to the learning rate.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Runs one step."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                self._step(parameters, group)

    def _step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        moments = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, moments, group["momentum"]))
        steps = orthogonal(ahead).to(parameters[0].dtype)
        size = SCALE * max(steps.shape[-2:]) ** 0.5
        weights: list[torch.Tensor] = [*parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(steps.unbind()), alpha=-group["lr"] * size)


class Guard:
    """Counts a gradient as zero where it is not finite or far larger than this parameter's has been in this run.

    About one gradient of 2,000 is, in an eager run; compiled blocks gave more of them (docs/emoji.md).

    Args:
        parameters: What is trained; all have a gradient in every step.
        factor: How many times the usual norm is too much.
        decay: Of the average that says what is usual.
        after: Steps that are only looked at, but for what is not finite.

    Attributes:
        dropped: Gradients counted as zero so far, on the device.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], factor: float = 10.0, decay: float = 0.95, after: int = 20
    ) -> None:
        self.parameters, self.factor, self.decay, self.after = list(parameters), factor, decay, after
        self.usual = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.usual.device)
        self.steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Looks at the gradients of a step, without waiting for the device."""
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        norms = torch.stack(torch._foreach_norm(gradients)).float()
        bad = ~norms.isfinite()
        most = torch.where(self.usual > 0, self.factor * self.usual, norms)
        if self.steps >= self.after:
            bad |= norms > most
        for gradient, each in zip(gradients, bad.unbind(), strict=True):
            gradient.masked_fill_(each, 0)
        share = max(1 - self.decay, 1 / (self.steps + 1))
        # What stays large becomes usual within some steps: nothing is kept from learning for good.
        self.usual.lerp_(torch.where(norms.isfinite(), torch.minimum(norms, most), self.usual), share)
        self.dropped += bad.sum()
        self.steps += 1


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T of each matrix U S V^T of [B, M, N]; bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Together(torch.optim.Optimizer):
    """Several optimizers as one, whose groups and states are those of its parts.

    Args:
        parts: Of parameters that no two of them share.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def load_state_dict(self, state_dict: Any) -> None:
        """See torch; what is loaded are new groups and states."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:
        """Runs a step of each."""
        for part in self.parts:
            part.step()


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: attention and MLP matrices of blocks, not embeddings, modulations and outer layers."""
    inside = any(f".{kind}." in f".{name}" for kind in BLOCKS)
    apart = ".norm" in name or "layer_norm" in name or "relative_attention_bias" in name
    return parameter.ndim == 2 and inside and not apart


def build_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon, with weight decay, and AdamW, without, over all parameters of a model that are trained.

    Their groups' entry "share" is what part of the learning rate they get.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    inner = [parameter for name, parameter in named if is_inner_matrix(name, parameter)]
    rest = [parameter for name, parameter in named if not is_inner_matrix(name, parameter)]
    fused = rest[0].is_cuda
    adam = torch.optim.AdamW(rest, lr=lr * ADAM_SHARE, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=fused)
    muon = Muon(inner, lr, weight_decay=weight_decay)
    muon.param_groups[0]["share"], adam.param_groups[0]["share"] = 1.0, ADAM_SHARE
    return [muon, adam]
