"""Training through 8 bits: values of the rounded call, gradients of the exact one."""

import pytest
import torch

import visattn
from visattn.straight import attention_through, straight_through

LAYOUT = visattn.Layout((4, 4))


def call(precision, pattern="na(window=3x3)"):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, 2, 8, generator=generator).requires_grad_() for _ in range(3))
    out = attention_through(q, k, v, visattn.parse(pattern), LAYOUT, precision=precision)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), (q.grad, k.grad, v.grad)


@pytest.mark.parametrize("pattern", ["na(window=3x3)", "topk(keep=0.5, block=2x2)"])
def test_the_forward_rounds_and_the_backward_does_not(pattern):
    exact, gradients = call(None, pattern)
    with straight_through():
        ours, found = call("int8", pattern)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, 2, 8, generator=generator) for _ in range(3))
    assert ours.equal(visattn.attention(q, k, v, pattern, LAYOUT, precision="int8"))
    assert not ours.equal(exact)
    assert all(torch.equal(one, other) for one, other in zip(gradients, found, strict=True))


def test_outside_of_it_gradients_are_refused():
    with pytest.raises(ValueError, match="for inference"):
        call("fp8")


LEARNED = [
    ("selective(of=na(window=3x3))", "query_weight", (2, 8)),
    ("clear(radius=2, pool=2)", "pool_weight", (2, 2)),
    ("gated(of=na(window=3x3))", "gate_weight", (2, 8)),
]


@pytest.mark.parametrize(("pattern", "name", "shape"), LEARNED)
def test_parameters_alone_learn_like_queries(pattern, name, shape):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 16, 2, 8, generator=generator)
    given = {name: torch.randn(shape, generator=generator).requires_grad_()}

    def run(precision):
        return attention_through(q, k, v, visattn.parse(pattern), LAYOUT, parameters=given, precision=precision)

    with pytest.raises(ValueError, match="for inference"):
        run("int8")
    with torch.no_grad():
        rounded = run("int8")
    with straight_through():
        ours = run("int8")
    assert ours.equal(rounded)
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    found, wanted = (torch.autograd.grad((out * weight).sum(), given[name])[0] for out in (ours, run(None)))
    assert torch.equal(found, wanted)


def test_a_classifier_in_8_bits_learns():
    timm = pytest.importorskip("timm")
    options = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with visattn.apply(model, "na(window=3x3)", precision="int8"):
        with torch.no_grad():
            truth = model(x)
        with straight_through():
            out = model(x)
            out.sum().backward()
        with pytest.raises(ValueError, match="for inference"):
            model(x)
    torch.testing.assert_close(out.detach(), truth)
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_a_model_in_8_bits_learns():
    from tests.support.tiny_digits import tiny_transformer

    model = tiny_transformer()
    given = {"timestep": torch.tensor([300.0]), "class_labels": torch.tensor([1])}
    x = torch.randn(1, 1, 8, 8)
    with visattn.apply(model, "na(window=3x3)", precision="int8"):
        with torch.no_grad():
            truth = model(x, **given).sample
        with straight_through():
            out = model(x, **given).sample
            out.sum().backward()
    torch.testing.assert_close(out.detach(), truth)
    assert model.transformer_blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
