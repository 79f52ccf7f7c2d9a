"""Attention layers of timm's CNNs: their authors' outputs, their formulas, and models that are built of them."""

import functools
import math
from pathlib import Path

import pytest
import timm
import torch

from tests.golden.fill import fill, make_input
from visattn.models.layers import ELA, GAAM, ULSAM

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "layers.pt", weights_only=True)
LAYERS = {"ulsam": lambda: ULSAM(12, 4), "gaam": lambda: GAAM(12, 5, 3, residual=False)}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_of_the_authors_code(name):
    layer = fill(LAYERS[name]()).double()
    keys = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert keys == GOLDEN[name]["keys"]
    x = make_input(GOLDEN["input_shape"], GOLDEN["input_seed"]).double()
    assert (layer(x) - GOLDEN[name]["output"]).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "groups": 4, "norm_groups": 8}])
def test_gates_of_rows_and_columns_value_by_value(options):
    layer = fill(ELA(16, **options)).double()
    x = make_input((2, 16, 5, 4), 3).double()
    each, reach = 16 // layer.conv.groups, layer.conv.kernel_size[0] // 2

    def gates(means):
        """[C, n] -> [C, n]."""
        sums = torch.zeros_like(means)
        for c in range(16):
            for i in range(means.shape[1]):
                for j in range(means.shape[1]):
                    if abs(j - i) <= reach:
                        own = means[c // each * each : c // each * each + each, j]
                        sums[c, i] += own @ layer.conv.weight[c, :, j - i + reach]
        parts = sums.view(layer.gn.num_groups, -1)
        normed = (parts - parts.mean(1, keepdim=True)) / (parts.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (normed.view_as(sums) * layer.gn.weight[:, None] + layer.gn.bias[:, None]).sigmoid()

    truth = torch.stack([one * gates(one.mean(2))[:, :, None] * gates(one.mean(1))[:, None] for one in x])
    assert (layer(x) - truth).abs().max() < 1e-12


def test_gaussians_value_by_value():
    layer = fill(GAAM(7, 2, 3)).double()
    x = make_input((1, 7, 2, 2), 3).double()
    truth = torch.zeros_like(x)
    for head, (first, last) in zip(layer.attention_heads, ((0, 3), (3, 7)), strict=True):
        for y in range(2):
            for z in range(2):
                row = x[0, first:last, y, z]
                mean, deviation = row.mean(), ((row - row.mean()).square().sum() / (len(row) - 1)).sqrt()
                products = []
                for value in row:
                    each = 1.0
                    for offset, c in zip(head.mean_offsets, head.c, strict=True):
                        shift = (value - mean - offset) / deviation
                        each = each * torch.exp(-shift * shift / (2 * c * c)) / (math.sqrt(2 * math.pi) * c.abs())
                    products.append(each)
                weights = torch.stack(products)
                truth[0, first:last, y, z] = row + row * weights / weights.sum()
    assert (layer(x) - truth).abs().max() < 1e-6


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_gaussians_along_any_axis_and_in_half(axis):
    layer, x = GAAM(8, 2, axis=axis), make_input((2, 8, 6, 5), 1)
    assert layer(x).shape == x.shape
    moved = GAAM(x.shape[axis], 2)
    moved.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), moved(x.transpose(1, axis)).transpose(1, axis), atol=1e-6)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - layer.float()(x)).abs().max() < 0.1


@pytest.mark.parametrize("layer", [ELA, ULSAM, functools.partial(GAAM, heads=2)])
def test_models_of_timm_take_them(layer):
    options = {"channels": (16, 16, 32, 32), "num_classes": 3, "block_args": {"attn_layer": layer}}
    # timm starts what adds to a block at zero.
    model = fill(timm.create_model("resnet10t", **options)).train()
    kind = layer.func if isinstance(layer, functools.partial) else layer
    assert sum(isinstance(module, kind) for module in model.modules()) == 4
    x = make_input((2, 3, 33, 40), 2)
    model(x).square().mean().backward()
    found = [p for m in model.modules() if isinstance(m, kind) for p in m.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in found) and any(p.grad.any() for p in found)
    again = timm.create_model("resnet10t", **options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_refusals():
    for wrong, message in (
        (lambda: ELA(24), "norm_groups=16 must divide the 24 channels"),
        (lambda: ELA(16, groups=3), "groups=3 must divide"),
        (lambda: ELA(16, 4), "kernel_size=4 must be odd"),
        (lambda: ULSAM(10, 4), "groups=4 must divide the 10 channels"),
        (lambda: ULSAM(8, 0), "groups=0 must be one whole number of at least 1"),
        (lambda: GAAM(8, 0), "heads=0 must be one whole number of at least 1"),
        (lambda: GAAM(8, 2, 0), "gaussians=0 must be one whole number of at least 1"),
        (lambda: GAAM(7, 4), "each needs two or more"),
        (lambda: GAAM(8, 3, axis=2)(torch.zeros(1, 8, 5, 5)), "too short for 3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
