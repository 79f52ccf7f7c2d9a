"""The attention calls of one forward of a model, as it makes them without any pattern."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

import torch

from visattn.given import said
from visattn.handle import apply
from visattn.patterns.values import whole_number
from visattn.recorded import Recorded
from visattn.selectors import Layers
from visattn.watch import Watched, Watcher

# Every key for every query: dense attention whose calls know where their tokens sit.
EVERYTHING = "topk(keep=1.0)"
# Bytes of queries, keys and values together.
LIMIT = 8 * 2**30
# Largest relative difference of an output that is looked at from the model's own, by the bits of its dtype.
SAME = {4: 1e-3, 2: 5e-2, 8: 1e-6}


class Gatherer:
    """A watcher that keeps the first call of each module where it is.

    Attributes:
        found: What was kept.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.found: dict[str, Recorded] = {}
        self._left, self._limit = limit, limit

    def __call__(self, watched: Watched) -> None:
        """Keep a call.

        Raises:
            ValueError: If the calls are larger than the limit, or samples sit in different places.
        """
        if watched.site in self.found:
            return
        if len(watched.layouts) != 1:
            raise ValueError(f"samples of {watched.site} have tokens in different places: give one sample at a time")
        q, k, v = watched.q.detach(), watched.k.detach(), watched.v.detach()
        self._left -= sum(t.numel() * t.element_size() for t in (q, k, v))
        if self._left < 0:
            raise ValueError(
                f"queries, keys and values are more than {self._limit / 2**30:.1f} GiB from {watched.site} on: choose "
                "fewer layers, or a larger limit"
            )
        self.found[watched.site] = Recorded(
            watched.site, watched.step, 0, q, k, v, watched.layouts[0], watched.scale, watched.key_mask
        )


def calls(model: Any, forward: Callable[[], Any], *, layers: Layers = None, limit: int = LIMIT) -> list[Recorded]:
    """The attention calls of one forward, in their order; the first where a module makes several.

    Args:
        model: A model of timm, transformers or diffusers that is not patched.
        forward: Runs it, and returns the tensor that it makes (or a tuple or a mapping whose first value it is).
        layers: Which layers, as for `visattn.apply`.
        limit: Bytes of queries, keys and values together.

    Returns:
        Calls whose tensors are where the model's are.

    Raises:
        ValueError: If no attention of the model can be looked at, its own is not dense, or there is too much.
    """
    check_forward(forward)
    limit = whole_number(limit, "limit", 1, high=2**63)
    with torch.no_grad():
        plain = output(forward())
        gatherer = Gatherer(limit)
        with Watching(model, forward, layers) as watching:
            out = watching.run(gatherer)
            watching.need(gatherer.found)
        off = distance(plain, out)
        if off <= SAME[plain.element_size()]:
            return list(gatherer.found.values())
        check_same(model, plain, output(forward()))
    raise ValueError(
        f"{type(model).__name__} gives other outputs ({off:.1e}, relative) when its attention is dense over all "
        "tokens: its own has windows or a bias, so there are no maps of it"
    )


def check_forward(forward: Any) -> None:
    """Raise a ValueError for what is no function that runs the model."""
    if not callable(forward) or isinstance(forward, type):
        raise ValueError(f"forward={said(forward)} must be a function that runs the model, like lambda: model(images)")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far an output is from another one, relative to that."""
    return float((other.double() - one.double()).norm() / one.double().norm().clamp(min=1e-30))


def check_same(model: Any, one: torch.Tensor, other: torch.Tensor) -> None:
    """Raise a ValueError if two forwards alike gave other outputs: chance would count as attention."""
    off = distance(one, other)
    if not off <= SAME[one.element_size()]:
        raise ValueError(
            f"two forwards of {type(model).__name__} give outputs that differ by {off:.1e} (relative), so that nothing "
            "is known of one: call model.eval() and let forward() draw nothing, or see that outputs are finite"
        )


class Watching:
    """A model whose dense calls watchers see, forward by forward; a context manager, which undoes that at its end."""

    def __init__(self, model: Any, forward: Callable[[], Any], layers: Layers = None) -> None:
        """Patch a model.

        Raises:
            ValueError: If it cannot be patched so.
        """
        check_forward(forward)
        self.name, self._forward = type(model).__name__, forward
        try:
            self._handle = apply(model, EVERYTHING, layers=layers, always=True)
        except ValueError as error:
            # What `apply` advises instead of that pattern is no advice on how to look.
            why = str(error).replace(str(EVERYTHING), "a call over all its keys").partition(": use ")[0]
            raise ValueError(f"no attention of {self.name} can be looked at: {why}") from error

    def run(self, watcher: Watcher) -> torch.Tensor:
        """Run the forward; a watcher sees its calls."""
        self._handle.watch(watcher)
        return output(self._forward())

    def need(self, seen: Sized) -> None:
        """Raise a ValueError that says why, if no call was seen."""
        if not seen:
            said = "; ".join(self._handle.report().fallbacks)
            why = said or "its keys are not its queries' tokens, it has a position bias, or none was called"
            raise ValueError(f"no attention of {self.name} can be looked at: {why}")

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def output(found: Any) -> torch.Tensor:
    """The tensor that a forward made.

    Raises:
        ValueError: If there is none.
    """
    if hasattr(found, "logits"):
        found = found.logits
    while not isinstance(found, torch.Tensor):
        values = list(found.values()) if hasattr(found, "values") else found
        if not isinstance(values, tuple | list) or not values:
            raise ValueError(f"forward() returned a {type(found).__name__}: return the tensor that the model makes")
        found = values[0]
    return found
