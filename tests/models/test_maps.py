"""Maps of whole models: what is looked at is what they compute, and heads matter as much as their gates do."""

import pytest
import timm
import torch
from torch import nn

from tests.support.tiny_timm import make, randomise
from visattn import maps
from visattn.maps.look import scored


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_classes=10).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
        nn.init.normal_(block.attn.proj.weight, std=0.3)
    nn.init.normal_(model.head.weight, std=0.5)
    return model, torch.randn(2, 3, 64, 64)


def gated(model, x, gates):
    """The model's output with each head multiplied by a gate [layers, heads], in the input of the projection."""

    def hook(layer):
        def scale(module, args):
            return (args[0].unflatten(-1, (3, 16)) * gates[layer][:, None]).flatten(-2)

        return scale

    hooks = [block.attn.proj.register_forward_pre_hook(hook(i)) for i, block in enumerate(model.blocks)]
    try:
        return model(x)
    finally:
        for each in hooks:
            each.remove()


def test_calls_are_those_of_the_model(vit):
    model, x = vit
    found = maps.calls(model, lambda: model(x))
    assert [call.site for call in found] == ["blocks.0.attn", "blocks.1.attn"]
    attn = model.blocks[0].attn
    with torch.no_grad():
        seen = attn.qkv(model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(x)))))
    q, k, _ = seen.unflatten(-1, (3, 3, 16)).unbind(2)
    torch.testing.assert_close(found[0].q, q)
    torch.testing.assert_close(found[0].k, k)
    assert found[0].layout.grid == (4, 4) and found[0].layout.prefix == 1
    assert [call.site for call in maps.calls(model, lambda: model(x), layers="1")] == ["blocks.1.attn"]
    with pytest.raises(ValueError, match=r"more than 0\.0 GiB from blocks\.0\.attn on"):
        maps.calls(model, lambda: model(x), limit=100)


def test_pruning_is_a_gate_of_zero(vit):
    model, x = vit
    found = maps.pruning(model, lambda: model(x), classes=True)
    with torch.no_grad():
        plain = model(x).double()
        for layer, head in ((0, 1), (1, 2)):
            gates = torch.ones(2, 3)
            gates[layer, head] = 0
            other = gated(model, x, gates).double()
            here = found[f"blocks.{layer}.attn"]
            change = ((other - plain).norm(dim=1) / plain.norm(dim=1)).mean()
            torch.testing.assert_close(here.change[head], change, rtol=1e-4, atol=1e-6)
            cosine = 1 - nn.functional.cosine_similarity(plain, other).mean()
            torch.testing.assert_close(here.cosine[head], cosine, rtol=1e-3, atol=1e-6)
            p, r = plain.softmax(-1), other.softmax(-1)
            best = p.argmax(-1)
            drop = (p - r)[torch.arange(2), best].mean()
            torch.testing.assert_close(here.drop[head], drop, rtol=1e-3, atol=1e-6)
            half = (p + r) / 2
            apart = (nn.functional.kl_div(half.log(), p, reduction="none").sum(-1)).mean() / 2
            apart = apart + nn.functional.kl_div(half.log(), r, reduction="none").sum(-1).mean() / 2
            torch.testing.assert_close(here.divergence[head], apart, rtol=1e-3, atol=1e-7)
    assert maps.pruning(model, lambda: model(x), layers="0")["blocks.0.attn"].drop is None


def test_gradients_are_those_of_gates(vit):
    model, x = vit
    found = maps.gradient(model, lambda: model(x), classes=True)
    gates = torch.ones(2, 3, requires_grad=True)
    each = [
        torch.autograd.grad(gated(model, x[i : i + 1], gates).log_softmax(-1).amax(), gates)[0].abs() for i in range(2)
    ]
    for layer in range(2):
        torch.testing.assert_close(found[f"blocks.{layer}.attn"], (each[0] + each[1])[layer] / 2, rtol=1e-3, atol=1e-6)


def test_random_directions_estimate_the_derivative_of_outputs_without_classes(vit):
    model, x = vit
    parameters = list(model.parameters())
    for each in parameters:
        each.requires_grad_(False)
    found = maps.gradient(model, lambda: model(x[:1]), probes=60)
    assert not any(each.requires_grad for each in parameters)
    for each in parameters:
        each.requires_grad_(True)
    jacobian = torch.autograd.functional.jacobian(lambda gates: gated(model, x[:1], gates)[0], torch.ones(2, 3))
    with torch.no_grad():
        wanted = jacobian.norm(dim=0) / model(x[:1]).norm()
    for layer in range(2):
        torch.testing.assert_close(found[f"blocks.{layer}.attn"], wanted[layer], rtol=0.4, atol=0.0)


def test_parts_of_samples_may_be_the_samples_of_a_module():
    model, x = make("mobilevit")
    randomise(model.eval())
    found = maps.gradient(model, lambda: model(x), classes=True)
    site = next(iter(found))
    gate = torch.ones(len(found[site]), requires_grad=True)

    def scale(module, args):
        return (args[0].unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(-2)

    hook = model.get_submodule(site).proj.register_forward_pre_hook(scale)
    wanted = torch.autograd.grad(model(x).log_softmax(-1).amax(-1).sum(), gate)[0].abs() / 2
    hook.remove()
    torch.testing.assert_close(found[site], wanted, rtol=1e-3, atol=1e-7)
    assert all((each > 0).all() for each in maps.gradient(model, lambda: model(x)).values())


def test_models_whose_attention_is_not_dense_are_refused():
    nest, x = make("nest")
    randomise(nest.eval())
    with pytest.raises(ValueError, match="its own has windows or a bias"):
        maps.calls(nest, lambda: nest(x))
    options = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 32, "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    with pytest.raises(ValueError, match=r"of SwinTransformer can be looked at: .* position bias"):
        maps.calls(model, lambda: model(x))


@pytest.mark.parametrize("look", [maps.calls, maps.pruning])
def test_chance_in_a_model_is_told_from_its_attention(look):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, proj_drop_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    randomise(model.train())
    with pytest.raises(ValueError, match=r"two forwards of VisionTransformer .* call model\.eval\(\)"):
        look(model, lambda: model(x))


def test_what_cannot_be_is_told(vit):
    model, x = vit
    with pytest.raises(ValueError, match="no scores of classes"):
        maps.gradient(model, lambda: model.forward_features(x), classes=True)
    with pytest.raises(ValueError, match="probes=0"):
        maps.gradient(model, lambda: model(x), probes=0)
    with pytest.raises(ValueError, match="returned a int"):
        maps.calls(model, lambda: 3)
    with pytest.raises(ValueError, match="no gradient flows"):
        maps.gradient(model, lambda: model(x).detach())


def test_saliency_maps_are_scored_on_masked_images(vit):
    model, x = vit
    whole = scored(model, x, torch.arange(32.0).view(2, 16), (4, 4))
    assert [each["share"] for each in whole] == [1.0, 0.5, 0.15]
    assert all(0 <= each["average_drop"] <= 1 and 0 <= each["confidence_gain"] <= 1 for each in whole)


def test_other_things_than_recorded_calls_and_forwards_are_refused():
    for run in (maps.spread, lambda x: maps.caught(x, "dense"), lambda x: maps.rows(x, [0]), maps.offsets):
        with pytest.raises(ValueError, match=r"None is no recorded call: pass one of those that visattn.maps.calls"):
            run(None)
    for run in (maps.overview, maps.rollout):
        with pytest.raises(ValueError, match="calls=3 must be a list of recorded calls"):
            run(3)
        with pytest.raises(ValueError, match="'x' is no recorded call"):
            run(["x"])
    for run in (maps.calls, maps.gradient, maps.pruning):
        with pytest.raises(ValueError, match="forward=None must be a function that runs the model"):
            run(torch.nn.Identity(), None)
    with pytest.raises(ValueError, match="limit='x' must be one whole number"):
        maps.calls(torch.nn.Identity(), lambda: None, limit="x")
