"""How much the heads of a model matter for what it makes: by zeroing each, or to first order by one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from visattn.given import switch
from visattn.maps.gather import Watching, check_same
from visattn.patterns.values import whole_number
from visattn.selectors import Layers
from visattn.watch import Watched

# Random directions in which the change of outputs that are no class scores is measured.
PROBES = 4


class Pruned(NamedTuple):
    """What zeroing one head's output before the projection does, for each head of a module: [H] each.

    Attributes:
        change: Distance of the outputs, relative to their norm.
        cosine: 1 - cosine of the outputs.
        drop: By how much the probability of the predicted class falls; None where the outputs are no class scores.
        divergence: Jensen-Shannon divergence of the class probabilities, in nats; likewise.
    """

    change: torch.Tensor
    cosine: torch.Tensor
    drop: torch.Tensor | None
    divergence: torch.Tensor | None

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON, what is known."""
        return {name: values.tolist() for name, values in self._asdict().items() if values is not None}


def pruning(
    model: Any, forward: Callable[[], Any], *, classes: bool = False, layers: Layers = None
) -> dict[str, Pruned]:
    """Zero the output of each head on its own: one forward a head.

    Args:
        model: A model that is not patched.
        forward: Runs it; its outputs are [N, ...].
        classes: Whether the outputs are scores of classes [N, C].
        layers: Which layers.

    Returns:
        Means over the samples, by module.

    Raises:
        ValueError: If no attention of the model can be looked at, or the outputs are no scores of classes.
    """
    switch(classes, "classes")
    heads: dict[str, int] = {}

    def count(watched: Watched) -> None:
        heads[watched.site] = watched.q.shape[2]

    with torch.no_grad(), Watching(model, forward, layers) as watching:
        plain = watching.run(count)
        watching.need(heads)
        _check_classes(plain, classes)
        check_same(model, plain, watching.run(lambda watched: None))
        found = {}
        target: list[Any] = [None, 0]

        def zero(watched: Watched) -> None:
            if watched.site == target[0]:
                watched.out[:, :, target[1]] = 0

        for site, number in heads.items():
            each = []
            for head in range(number):
                target[:] = site, head
                each.append(_compared(plain, watching.run(zero), classes))
            change, cosine, *others = zip(*each, strict=True)
            drop, divergence = map(torch.stack, others) if classes else (None, None)
            found[site] = Pruned(torch.stack(change), torch.stack(cosine), drop, divergence)
    return found


def gradient(
    model: Any, forward: Callable[[], Any], *, classes: bool = False, layers: Layers = None, probes: int = PROBES
) -> dict[str, torch.Tensor]:
    """How much the output moves with a gate on each head's output, to first order at a gate of 1, all heads at once.

    The gradient of the gate is the sum of g o over queries and channels, where o is the head's output and g its own
    gradient (Michel et al., "Are Sixteen Heads Really Better than One?", 2019, section 4.1). With classes it is that of
    the logarithm of the predicted class' probability, one backward. Otherwise it is the norm of the output's
    derivative, relative to the output's, estimated in some random directions with a backward each.

    Args:
        model: A model that is not patched.
        forward: Runs it; gradients have to flow.
        classes: Whether the outputs are scores of classes [N, C].
        layers: Which layers.
        probes: Directions without classes.

    Returns:
        [H] by module, means over the samples.

    Raises:
        ValueError: If no attention of the model can be looked at, no gradient flows, or `probes` is below 1.
    """
    switch(classes, "classes")
    probes = whole_number(probes, "probes", 1)
    outs: dict[str, torch.Tensor] = {}

    def keep(watched: Watched) -> None:
        outs.setdefault(watched.site, watched.out)

    with torch.enable_grad(), Watching(model, forward, layers) as watching, _learning(model):
        found = watching.run(keep)
        watching.need(outs)
        if not found.requires_grad:
            raise ValueError(f"no gradient flows through {type(model).__name__}: leave no_grad out, or prune heads")
        _check_classes(found, classes)
        if classes:
            objective = found.float().log_softmax(-1).amax(-1).sum()
            found_by = _gates(objective, outs, len(found))
            return {site: each.abs().sum(0) / len(found) for site, each in found_by.items()}
        generator = torch.Generator().manual_seed(0)
        total = {site: torch.zeros((), device=out.device) for site, out in outs.items()}
        norms = found.detach().float().flatten(1).square().sum(1)[:, None].clamp(min=1e-30)
        for _ in range(probes):
            direction = torch.randn(found.shape, generator=generator, device="cpu").to(found.device)
            objective = (found.float() * direction).sum()
            for site, each in _gates(objective, outs, len(found)).items():
                total[site] = total[site] + each.square() / (norms if len(each) == len(norms) else norms.sum())
    return {site: (each / probes).sqrt().mean(0) for site, each in total.items()}


def _gates(objective: torch.Tensor, outs: dict[str, torch.Tensor], samples: int) -> dict[str, torch.Tensor]:
    """Gradient of a gate of 1 on each head [samples, H]; [1, H], of all samples, where a module has another batch."""
    gradients = torch.autograd.grad(objective, list(outs.values()), retain_graph=True, allow_unused=True)
    found = {}
    for (site, out), g in zip(outs.items(), gradients, strict=True):
        each = torch.zeros_like(out) if g is None else g
        gate = (each.float() * out.detach().float()).sum((1, 3))
        # Parts of a sample may be samples of a module: patches of MobileViT.
        found[site] = gate if len(gate) == samples else gate.sum(0, keepdim=True)
    return found


@contextmanager
def _learning(model: Any) -> Iterator[None]:
    """Inside, gradients flow from the first parameter on, also where a model is frozen."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in frozen:
            each.requires_grad_(False)


def _compared(plain: torch.Tensor, other: torch.Tensor, classes: bool) -> tuple[torch.Tensor, ...]:
    """Change, 1 - cosine, and of classes drop of the probability and divergence: means over samples."""
    one, two = plain.double().flatten(1), other.double().flatten(1)
    change = ((two - one).norm(dim=1) / one.norm(dim=1).clamp(min=1e-30)).mean()
    cosine = (1 - torch.nn.functional.cosine_similarity(one, two)).mean()
    if not classes:
        return change, cosine
    p, r = plain.double().softmax(-1), other.double().softmax(-1)
    best = p.argmax(-1, keepdim=True)
    drop = (p.gather(-1, best) - r.gather(-1, best)).mean()
    middle = ((p + r) / 2).log()
    apart = sum((x * (x.clamp(min=1e-300).log() - middle)).sum(-1) for x in (p, r))
    assert isinstance(apart, torch.Tensor)
    return change, cosine, drop, (apart / 2).mean()


def _check_classes(out: torch.Tensor, classes: bool) -> None:
    if classes and (out.ndim != 2 or out.shape[1] < 2):
        raise ValueError(f"outputs {list(out.shape)} are no scores of classes [N, C]: leave classes out")
