"""Routing's own kernels: the same choice and the same lists as torch's operators give."""

import pytest
import torch

from visattn import Layout, parse
from visattn.kernels.triton.backend import kernels_of
from visattn.kernels.triton.prepared import Kernels
from visattn.kernels.triton.routes import routed_program
from visattn.kernels.triton.routing.router import Chosen
from visattn.problem import Call

CASES = {
    "even": ("routing(regions=4x4,topk=3)", Layout((16, 16)), 2, 2),
    "text": ("routing(regions=4x2,topk=2)", Layout((16, 12), 5, 3), 2, 1),
    "uneven": ("routing(regions=3x3,topk=4)", Layout((10, 11), 2), 1, 1),
    "line": ("routing(regions=5,topk=2)", Layout(37), 3, 3),
    "large regions": ("routing(regions=2x2,topk=3)", Layout((32, 24), 1), 2, 2),
    "all but one": ("routing(regions=2x2,topk=3)", Layout((8, 8)), 1, 1),
}


def made(name, seed=0, head_dim=24):
    text, layout, heads, kv_heads = CASES[name]
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, layout.length, n, head_dim, generator=draw) for n in (heads, kv_heads))
    pattern = parse(text)
    return pattern, layout, q, k, kernels_of(q, k, k, Call(pattern, layout, 1.0), lambda: None)


@pytest.mark.parametrize("name", CASES)
def test_the_choice_and_the_lists_are_those_of_the_pattern(name):
    pattern, layout, q, k, kernels = made(name)
    chosen = kernels.lists(q, k, k, None, True)
    assert isinstance(chosen, Chosen)
    assert torch.equal(chosen.choice(), pattern.choose(q, k, layout))
    for direction in ("forward", "query_grad", "key_grad"):
        plan = kernels._work.plan(direction)
        wanted = routed_program(plan, direction == "key_grad", pattern.route(q, k, plan))
        assert listed(chosen.program(direction)) == listed(wanted), direction


def listed(program):
    """What each row of each sample visits, and from where on with a mask."""
    found = []
    for sample in range(len(program.bases)):
        bounds = program.bounds.view(-1, len(program.tokens), 4)
        for start, turn, stop, dense in bounds[min(sample, len(bounds) - 1)].tolist():
            bases, masks = (t[sample, start:stop].tolist() for t in (program.bases, program.mask_ids))
            found.append((turn - start, dense, bases, masks))
    return found


def test_equal_products_go_to_the_lower_index():
    _, _, q, _, kernels = made("even")
    # Every region's mean key is one of two.
    k = torch.zeros_like(q).unflatten(1, (4, 4, 16))
    k[:, 1::2] = 1
    chosen = kernels.lists(q, k.flatten(1, 3), k.flatten(1, 3), None, False)
    means = q.unflatten(1, (4, 4, 4, 4)).mean((2, 4)).flatten(1, 2).sum((2, 3))
    upper, lower = torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    wanted = torch.where((means > 0)[..., None], upper, lower)
    assert torch.equal(chosen.choice(), wanted)


def test_numbers_that_are_none_choose_every_region_once_at_most():
    _, _, q, k, kernels = made("even")
    q[0, :40], k[1, 7] = float("nan"), float("-inf")
    choice = kernels.lists(q, k, k, None, False).choice()
    assert choice.min() >= 0 and choice.max() < 16
    assert all(len(set(row)) == 3 for row in choice.flatten(0, 1).tolist())


@pytest.mark.parametrize("name", ["even", "text"])
def test_masks_and_very_many_regions_are_left_to_torch(name, monkeypatch):
    from visattn.kernels.triton import config

    pattern, _, q, k, kernels = made(name)
    mask = torch.rand(q.shape[:2]) > 0.3
    found = kernels.lists(q, k, k, mask, False)
    plan = kernels._work.plan("forward")
    assert listed(found.program("forward")) == listed(routed_program(plan, False, pattern.route(q, k, plan, mask)))
    monkeypatch.setattr(config, "MOST_REGIONS", 3)
    assert not isinstance(kernels.lists(q, k, k, None, False), Chosen)
    assert isinstance(kernels, Kernels)
