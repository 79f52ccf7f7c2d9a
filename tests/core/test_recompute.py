"""The value of a forward in the recomputations of its blocks."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from visattn.recompute import Carrier


class Block(nn.Module):
    """Multiplies by a weight, and by what the carrier says."""

    def __init__(self, carrier):
        super().__init__()
        self.carrier, self.weight, self.seen = carrier, nn.Parameter(torch.tensor(1.5)), []

    def forward(self, x):
        self.carrier.pass_by(x)
        self.seen.append(self.carrier.value)
        return (x * self.weight * self.carrier.value).sin()


def wrapped(x, block):
    """A part of a block around what passes by: it gets another tensor than the carrier has seen."""
    return block(x.cos())


UNITS = {
    "plain": lambda block, x: block(x),
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "inner": lambda block, x: checkpoint(wrapped, x, block, use_reentrant=False),
    "nested": lambda block, x: checkpoint(
        lambda y: checkpoint(block, checkpoint(block, y, use_reentrant=False), use_reentrant=False),
        x,
        use_reentrant=False,
    ),
}


def run(block, unit, values, frozen=False):
    """The gradient of the block's weight after forwards with several values and one backward pass."""
    block.weight.grad = None
    inputs = [torch.linspace(0, 1, 5, requires_grad=not frozen) for _ in values]
    outputs = []
    for value, x in zip(values, inputs, strict=True):
        block.carrier.begin(value)
        outputs.append(unit(block, x * 2))
    block.carrier.begin(100.0)  # an evaluation in between
    with torch.no_grad():
        block(inputs[0])
    torch.stack([out.sum() for out in outputs]).sum().backward()
    return block.weight.grad


@pytest.mark.parametrize("unit", UNITS)
def test_a_recomputation_has_the_value_of_its_forward(unit):
    block = Block(Carrier())
    plain = {"inner": lambda block, x: wrapped(x, block), "nested": lambda block, x: block(block(x))}
    wanted = run(block, plain.get(unit, UNITS["plain"]), [2.0, 3.0, 5.0])
    assert torch.equal(run(block, UNITS[unit], [2.0, 3.0, 5.0]), wanted)


@pytest.mark.parametrize("unit", ["not reentrant", "nested"])
def test_what_needs_no_gradient_may_come_in(unit):
    block = Block(Carrier())
    plain = {"nested": lambda block, x: block(block(x))}
    wanted = run(block, plain.get(unit, UNITS["plain"]), [2.0, 3.0], frozen=True)
    assert torch.equal(run(block, UNITS[unit], [2.0, 3.0], frozen=True), wanted)


def test_unknown_where_nothing_of_the_forward_comes_back():
    block = Block(Carrier())
    with pytest.raises(TypeError):
        run(block, UNITS["inner"], [2.0, 3.0], frozen=True)
    assert block.seen[-1] is None


def test_inputs_that_are_copies():
    block = Block(Carrier())
    wanted = run(block, UNITS["plain"], [2.0, 3.0])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        assert torch.equal(run(block, UNITS["not reentrant"], [2.0, 3.0]), wanted)


def test_threads_do_not_see_each_other():
    block, found = Block(Carrier()), {}
    barrier = threading.Barrier(2)

    def forward(value):
        x = torch.ones(1, requires_grad=True)
        block.carrier.begin(value)
        barrier.wait()
        found[value] = UNITS["not reentrant"](block, x), x

    threads = [threading.Thread(target=forward, args=(value,)) for value in (2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, (out, x) in found.items():
        out.sum().backward()
        assert torch.allclose(x.grad, 1.5 * value * torch.tensor(1.5 * value).cos())


def test_a_forward_inside_of_a_backward_pass_has_its_own_value():
    block = Block(Carrier())
    x = torch.ones(1, requires_grad=True)
    block.carrier.begin(2.0)
    y = UNITS["not reentrant"](block, x)
    seen = []

    def teacher(grad):
        block.carrier.begin(7.0)
        with torch.no_grad():
            seen.append(block(torch.ones(1)))

    y.register_hook(teacher)
    y.sum().backward()
    assert torch.equal(seen[0], torch.tensor([1.5 * 7.0]).sin())
    assert block.seen == [2.0, 7.0, 2.0]


def test_nothing_is_kept_beyond_the_graph():
    carrier = Carrier()
    value = type("Value", (), {})()
    kept = weakref.ref(value)
    carrier.begin(value)
    x = torch.ones(1, requires_grad=True) * 2
    carrier.pass_by(x)
    carrier.begin(None)
    del value, x
    gc.collect()
    assert kept() is None


def test_tensors_without_memory_pass_by():
    carrier = Carrier()
    carrier.begin(1)

    def function(x):
        carrier.pass_by(x)
        return x

    torch.func.vmap(function)(torch.ones(2, 3))
    assert carrier.value == 1
