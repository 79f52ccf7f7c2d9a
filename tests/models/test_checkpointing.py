"""Gradient checkpointing of swapped timm models: a recomputation has the grid of its forward."""

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch.utils.checkpoint import checkpoint

import visattn
from tests.models.test_swap import flexible

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 96, "dynamic_img_size": True},
    "vit_small_patch16_dinov3": {"img_size": 96, "dynamic_img_size": True},
    "eva02_tiny_patch14_224": {"img_size": 84, "patch_size": 14, "dynamic_img_size": True},
}
LANDSCAPE, PORTRAIT = (2, 6), (6, 2)


def randomise(model):
    """Weights at which attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def make(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **{**SMALL, **MODELS[name], **kwargs}))
    visattn.apply(model, "na(window=3x3)")
    return model.train()


def images(model, grids):
    made = torch.Generator().manual_seed(1)
    sides = model.patch_embed.patch_size
    return [
        torch.randn(1, 3, *(n * side for n, side in zip(grid, sides, strict=True)), generator=made) for grid in grids
    ]


def gradients(model, inputs, between=None):
    """Of all parameters, after one backward pass over several forwards."""
    model.zero_grad()
    loss = sum(model(x).square().sum() for x in inputs)
    if between is not None:
        with torch.no_grad():
            model(between)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grids", [(LANDSCAPE, PORTRAIT), ((4, 4), (2, 3))], ids=["same length", "crops"])
def test_two_grids_before_one_backward(name, grids):
    model = make(name)
    inputs, (other,) = images(model, grids), images(model, [(3, 4)])
    wanted = gradients(model, inputs)
    model.set_grad_checkpointing(True)
    same(gradients(model, inputs, between=other), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_other_ways_to_checkpoint(monkeypatch, every, reentrant):
    from timm.models import vision_transformer

    model = make()
    inputs = images(model, [LANDSCAPE, PORTRAIT])
    wanted = gradients(model, inputs)
    run = vision_transformer.checkpoint_seq
    monkeypatch.setattr(
        vision_transformer, "checkpoint_seq", lambda blocks, x: run(blocks, x, every=every, use_reentrant=reentrant)
    )
    model.set_grad_checkpointing(True)
    same(gradients(model, inputs), wanted)


@pytest.mark.parametrize("part", ["attn", "norm1 and attn"])
def test_parts_of_a_block(part):
    model = make()
    inputs = images(model, [LANDSCAPE, PORTRAIT])
    wanted = gradients(model, inputs)
    for block in model.blocks:
        attend, norm = block.attn.forward, block.norm1.forward
        if part == "attn":
            call = block.attn

            class Checkpointed(torch.nn.Module):
                def __init__(self, inner):
                    super().__init__()
                    self.inner = inner

                def forward(self, x, **kwargs):
                    return checkpoint(self.inner, x, use_reentrant=False, **kwargs)

            block.attn = Checkpointed(call)
        else:
            block.norm1.forward = lambda x: x
            block.attn.forward = lambda x, attend=attend, norm=norm, **k: checkpoint(
                lambda y: attend(norm(y), **k), x, use_reentrant=False
            )
    found = gradients(model, inputs)
    same({name.replace(".inner", ""): value for name, value in found.items()}, wanted)


def test_inputs_that_are_offloaded():
    model = make()
    inputs = images(model, [LANDSCAPE, PORTRAIT])
    wanted = gradients(model, inputs)
    model.set_grad_checkpointing(True)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        same(gradients(model, inputs), wanted)


def test_a_frozen_beginning():
    model = make()
    for parameter in [*model.patch_embed.parameters(), model.cls_token, model.pos_embed, *model.blocks[0].parameters()]:
        parameter.requires_grad_(False)
    model.blocks[0].mlp.requires_grad_(True)
    inputs = images(model, [LANDSCAPE, PORTRAIT])
    wanted = gradients(model, inputs)
    model.set_grad_checkpointing(True)
    same(gradients(model, inputs), wanted)


def test_tokens_of_no_known_forward_are_refused():
    model = make()
    with torch.no_grad():
        for x in images(model, [LANDSCAPE, PORTRAIT]):
            model(x)
    tokens = torch.randn(1, 13, 48, requires_grad=True)
    y = tokens * 2

    def late(_):
        model.blocks[0](torch.randn(1, 13, 48))

    y.register_hook(late)
    with pytest.raises(ValueError, match=r"13 tokens came without the forward that they belong to, and they may be "):
        y.sum().backward()


def test_batches_of_several_grids():
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = randomise(timm.create_model("naflexvit_base_patch16_gap", **options)).train()
    visattn.apply(model, "na(window=3)")
    batches = [flexible([(2, 3), (4, 2)], 8), flexible([(4, 2), (3, 2)], 8)]
    wanted = gradients(model, batches)
    model.set_grad_checkpointing(True)
    same(gradients(model, batches), wanted)


def compiled(model, how):
    """Compile parts of a model, or the whole: what to call."""
    torch._dynamo.reset()
    options = {"backend": "eager", "fullgraph": True}
    if how == "whole":
        return torch.compile(model, **options)
    for i, block in enumerate(model.blocks):
        if how == "blocks":
            block.compile(**options)
        elif how == "attention":
            block.attn.compile(**options)
        elif how == "forwards":
            block.forward = torch.compile(block.forward, **options)
        else:
            model.blocks[i] = torch.compile(block, **options)
    return model


@pytest.mark.parametrize("how", ["blocks", "attention", "forwards", "wrapped", "whole"])
def test_checkpointed_code_that_is_compiled(how):
    model = make(depth=1)
    inputs, (other,) = images(model, [LANDSCAPE, PORTRAIT]), images(model, [(3, 4)])
    wanted = gradients(model, inputs)
    called = compiled(model, how)
    model.set_grad_checkpointing(True)
    found = gradients(called, inputs, between=None if how == "whole" else other)
    same({name.replace("_orig_mod.", ""): value for name, value in found.items()}, wanted)


@pytest.mark.parametrize("how", ["blocks", "wrapped"])
def test_compiled_blocks_without_the_call_of_the_model(how):
    """Features alone, whose backward pass begins inside of the model."""
    model = make(depth=1)
    inputs = images(model, [LANDSCAPE, PORTRAIT])

    def features():
        model.zero_grad()
        outs = [model.forward_intermediates(x, intermediates_only=True)[0] for x in inputs]
        sum(out.square().sum() for out in outs).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {name.replace("_orig_mod.", ""): value for name, value in found.items()}

    wanted = features()
    compiled(model, how)
    model.set_grad_checkpointing(True)
    same(features(), wanted)


def test_compiled_blocks_that_cannot_know_their_forward_are_refused():
    model = make(depth=1)
    compiled(model, "blocks")
    for x in images(model, [LANDSCAPE, PORTRAIT]):
        model(x)
    y = torch.randn(1, 13, 48, requires_grad=True) * 2
    y.register_hook(lambda _: model.blocks[0](torch.randn(1, 13, 48)) and None)
    with pytest.raises(ValueError, match=r"13 tokens came without the forward that they belong to, and they may be "):
        y.sum().backward()


def test_remove_gives_compiled_blocks_their_calls_back():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, img_size=96, dynamic_img_size=True).eval()
    (x,) = images(randomise(model), [LANDSCAPE])
    stock = model(x)
    compiled(model, "blocks")
    calls = [block._compiled_call_impl for block in model.blocks]
    with visattn.apply(model, "na(window=3x3)"):
        assert (model(x) - stock).abs().max() > 1e-5
    assert [block._compiled_call_impl for block in model.blocks] == calls
    assert torch.allclose(model(x), stock, atol=1e-5)
