"""What routers learn from: exact attention of pairs of blocks, soft lists, and models that train with them."""

import math

import pytest
import torch

import visattn
from tests.support.cases import gradients, qkv
from visattn import Layout, attention, attention_rows, parse
from visattn.patterns.choice.blocks import token_blocks
from visattn.patterns.hybrid.parts import soft_lists
from visattn.patterns.hybrid.targets import block_attention, router_losses
from visattn.router import losses_of_call

LAYOUT = Layout((4, 6), 2, 1)


def start(pattern, layout, heads=2, dim=4):
    found = pattern.initial_parameters(heads, dim, layout.grid)
    return {name: value.double().requires_grad_() for name, value in found.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["sum", "max"])
def test_exact_attention_of_pairs_of_blocks(pool, masked):
    layout, pattern = Layout((5, 6)), parse("sla2(block=2x4, key_block=2x2)")
    q, k, _ = qkv(layout, 4, 2, dim=4, batch=2)
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) < (0.6 if masked else 2)
    blocks = pattern.blocks(layout.grid)
    found = block_attention(q, k, layout, blocks, valid if masked else None, 0.7, pool)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    weights = attention_rows(q, k, "dense", layout, torch.arange(30), scale=0.7, key_mask=valid)
    expected = torch.zeros_like(found)
    for b in range(2):
        for i in range(blocks.rows):
            for j in range(blocks.columns):
                part = weights[b][:, (rows == i) & valid[b]][..., columns == j]
                if part.shape[1]:
                    expected[b, :, i, j] = part.sum((1, 2)) if pool == "sum" else part.amax((1, 2))
    expected = expected / expected.sum(-1, keepdim=True).clamp_min(1e-300)
    assert (found - expected).abs().max() < 1e-12
    some = block_attention(q, k, layout, blocks, valid if masked else None, 0.7, pool, torch.tensor([2, 0]))
    assert (some - expected[:, :, [2, 0]]).abs().max() < 1e-12
    assert ((found.sum(-1) - 1).abs() < 1e-12).logical_or(found.sum(-1) == 0).all()


def test_soft_lists_add_up_and_have_the_gradient_of_their_equation():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[0, 2] = -math.inf
    found = soft_lists(scores, 2, 0.3)
    assert (found.sum(-1) - 2).abs().max() < 1e-9 and found[0, 2] == 0
    finite = scores[1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_lists(x, 2, 0.3), finite)
    # A low temperature marks the best.
    best = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
    assert (soft_lists(scores, 2, 0.001) - best).abs().max() < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_soft_lists_of_a_low_temperature_are_hard_ones(masked):
    q, k, v = qkv(LAYOUT, 2, dim=4, batch=2, grad=True)
    mask = torch.rand(2, LAYOUT.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    weight = 1 if mask is None else mask[..., None, None].to(q.dtype)
    hard, soft = parse("sla2(keep=3, block=2x2)"), parse("sla2(keep=3, block=2x2, soft=0.00001)")
    given = start(hard, LAYOUT)
    found = [attention(q, k, v, p, LAYOUT, parameters=given, key_mask=mask) * weight for p in (hard, soft)]
    assert (found[0] - found[1]).abs().max() < 1e-6
    for a, b in zip(*(gradients(each, (q, k, v, given["ratio"])) for each in found), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_gradients_of_soft_lists():
    layout, pattern = Layout((4, 4), 1), parse("sla2(keep=2, block=2x2, soft=0.5)")
    q, k, v = qkv(layout, 1, dim=3, grad=True)
    given = start(pattern, layout, 1, 3)

    inputs = [q, k, v, *given.values()]
    generator = torch.Generator().manual_seed(4)
    ways = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]

    def out(step):
        q, k, v, *values = [x + step * way for x, way in zip(inputs, ways, strict=True)]
        found = attention(q, k, v, pattern, layout, parameters=dict(zip(given, values, strict=True)))
        return (found * torch.linspace(-1, 1, found.numel(), dtype=q.dtype).view(found.shape)).sum()

    grads = torch.autograd.grad(out(0.0), inputs)
    along = sum((grad * way).sum() for grad, way in zip(grads, ways, strict=True))
    with torch.no_grad():
        assert abs((out(1e-5) - out(-1e-5)) / 2e-5 - along) < 1e-6 * abs(along)


@pytest.mark.parametrize("text", ["sla2(keep=2, block=2x2)", "gate(by=topk(keep=2, always=none, block=2x2), dim=6)"])
def test_the_router_learns_where_attention_goes(text):
    layout, pattern = Layout((6, 6)), parse(text)
    q, k, _ = qkv(layout, 2, dim=4)
    given = start(pattern, layout)
    optimizer, found = torch.optim.Adam(given.values(), 0.1), []
    target = None if "gate" in text else block_attention(3 * q, 3 * k, layout, pattern.blocks((6, 6)))
    for _ in range(16):
        losses = router_losses(pattern, 3 * q, 3 * k, layout, given, target=target)
        assert set(losses) == ({"router"} if "gate" in text else {"router", "ratio"})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in given.values())
        optimizer.step()
        found.append({name: float(value.detach()) for name, value in losses.items()})
    assert all(found[-1][name] < 0.6 * found[0][name] for name in found[0])


def test_a_router_that_is_right_has_no_loss():
    layout, pattern = Layout(12), parse("sla2(keep=1, block=1)")
    q, k, _ = qkv(layout, 2, dim=4)
    losses = router_losses(pattern, q, k, layout, start(pattern, layout), temperature=2.0)
    assert all(float(value.detach()) < 1e-12 for value in losses.values())
    with pytest.raises(ValueError, match=r"temperature=0 must be above 0"):
        router_losses(pattern, q, k, layout, {}, temperature=0)
    with pytest.raises(ValueError, match=r"pool='mean' must be sum or max"):
        block_attention(q, k, layout, pattern.blocks((12,)), pool="mean")


@pytest.mark.parametrize(
    "text",
    [
        "sla(keep=0.3, block=2x3)",
        "sla2(keep=0.3, block=2x3)",
        "vsa(keep=0.3, block=2x3)",
        "gate(by=topk(keep=0.3, block=2x3), dim=6)",
    ],
)
def test_patched_models_train_and_keep_what_is_learned(text, tmp_path):
    pytest.importorskip("diffusers")
    from tests.support import tiny_models

    model, inputs = tiny_models.flux(single=1)
    stock, losses, weights = tiny_models.run(model, inputs), [], tmp_path / "own.safetensors"
    with visattn.apply(model, text, strict=True, untrained=True) as handle:
        handle.watch(lambda watched: losses.append(losses_of_call(watched)))
        model(**inputs, return_dict=False)[0].square().mean().backward()
        found = [p for site in handle.parameters for p in handle.parameters[site].values()]
        assert len(losses) == len(handle.parameters)
        if "gate" not in text:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found)
        if "gate" in text or "sla2" in text:
            sum(sum(each.values()) for each in losses).backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found)
        with torch.no_grad():
            for p in found:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        changed = tiny_models.run(model, inputs)
        handle.save(weights)
    torch.testing.assert_close(tiny_models.run(model, inputs), stock)
    with visattn.apply(model, text, weights=weights, caught=8) as handle:
        torch.testing.assert_close(tiny_models.run(model, inputs), changed)
        site = handle.report().sites[0]
        assert 0 < site.density < 1 and 0 < site.caught.mean < 1
