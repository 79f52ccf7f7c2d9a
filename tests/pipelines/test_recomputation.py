"""Gradient checkpointing: a recomputed block has the grid and the step of its own forward."""

import threading
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_control, tiny_models, tiny_unets


def of_latents(builder, first, second, name="hidden_states"):
    """A model and its inputs at two shapes whose sequences are equally long."""
    model, inputs = builder()
    return model, [inputs | {name: tiny_models.noise(*shape)} for shape in (first, second)]


def flux():
    model, _ = tiny_models.flux()
    return model, [tiny_models.flux_inputs(4, 9, batch=1), tiny_models.flux_inputs(9, 4, batch=1)]


def z_image():
    model, inputs = tiny_models.z_image()
    return model, [inputs | {"x": [tiny_models.noise(4, 1, *shape)]} for shape in ((8, 18), (18, 8))]


# Blocks with positional and with keyword arguments, joint and single, of a UNet, its ControlNet and of videos.
MODELS = {
    "flux": flux,
    "z_image": z_image,
    "sd15": partial(of_latents, tiny_models.sd15, (2, 4, 12, 10), (2, 4, 10, 12), "sample"),
    "svd": partial(of_latents, tiny_unets.svd, (1, 5, 4, 12, 10), (1, 5, 4, 10, 12), "sample"),
    "controlnet": partial(of_latents, tiny_control.controlnet, (2, 4, 12, 10), (2, 4, 10, 12), "sample"),
    "sd3": partial(of_latents, tiny_models.sd3, (2, 4, 8, 18), (2, 4, 18, 8)),
    "wan": partial(of_latents, tiny_models.wan, (1, 4, 3, 12, 8), (1, 4, 3, 8, 12)),
    "cogvideox": partial(of_latents, tiny_models.cogvideox, (1, 3, 4, 4, 8), (1, 3, 4, 8, 4)),
    "hunyuan_video": partial(of_latents, tiny_models.hunyuan_video, (2, 4, 3, 4, 6), (2, 4, 3, 6, 4)),
}
FUNCTIONS = {
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
}


def total(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    return sum(part.square().sum() for part in (out if isinstance(out, list | tuple) else [out]))


def gradients(model, inputs, between=lambda: None):
    """Gradients of the weights after one backward pass through several forwards."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_()
    loss = sum(total(model, each) for each in inputs)
    between()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def with_control(name, inputs):
    if name != "controlnet":
        return inputs
    return [
        each | {"controlnet_cond": tiny_models.noise(2, 3, *(2 * n for n in each["sample"].shape[2:]))}
        for each in inputs
    ]


def pattern_of(inputs):
    return "na(window=3x3x3)" if any(getattr(v, "ndim", 0) == 5 for v in inputs.values()) else "na(window=3x3)"


@pytest.mark.parametrize("name", MODELS)
def test_two_shapes_before_one_backward(name):
    model, inputs = MODELS[name]()
    inputs = with_control(name, inputs)
    pattern = "na(window=3x3)" if name == "svd" else pattern_of(inputs[0])
    with visattn.apply(model, pattern):
        wanted = gradients(model, inputs)
        model.train()
        model.enable_gradient_checkpointing()
        got = gradients(model, inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_evaluation_of_another_shape_in_between(kind):
    model, inputs = flux()
    other = tiny_models.flux_inputs(6, 6, batch=1)
    with visattn.apply(model, "na(window=3x3)"):
        wanted = gradients(model, inputs)
        model.train()
        model.enable_gradient_checkpointing(FUNCTIONS[kind])
        inputs = [each | {"hidden_states": each["hidden_states"].requires_grad_()} for each in inputs]
        got = gradients(model, inputs, lambda: tiny_models.run(model, other))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SLOW = [pytest.param(name, kind, marks=pytest.mark.slow) for name in ("flux", "sd15") for kind in FUNCTIONS]


@pytest.mark.parametrize(("name", "kind"), [("small", "not reentrant"), *SLOW])
def test_blocks_that_are_compiled_one_by_one(name, kind):
    if name == "small":
        model, inputs = tiny_models.flux(single=1)[0], flux()[1]
    else:
        model, inputs = MODELS[name]()
    key = "sample" if name == "sd15" else "hidden_states"
    with visattn.apply(model, "na(window=3x3)"):
        wanted = gradients(model, inputs)
        model.train()
        model.enable_gradient_checkpointing(FUNCTIONS[kind])
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="eager" if name == "small" else "aot_eager", fullgraph=True)
        got = gradients(model, [each | {key: each[key].requires_grad_()} for each in inputs])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_compiled_whole_is_refused_with_the_way():
    model, inputs = tiny_models.flux(single=1)[0], flux()[1]
    with visattn.apply(model, "na(window=3x3)"):
        wanted = gradients(model, inputs[:1])
        model.train()
        model.enable_gradient_checkpointing()
        torch._dynamo.reset()
        whole = torch.compile(model, backend="aot_eager")
        # With forwards of one kind there is nothing to mix up.
        for a, b in zip(gradients(whole, inputs[:1]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"one of several forwards.*compile its blocks instead"):
            gradients(whole, inputs)


def test_dense_and_sparse_steps_before_one_backward():
    model, (inputs, _) = flux()

    def both():
        model.zero_grad()
        losses = []
        for step in (0, 1):
            handle.set_step(step, 2)
            losses.append(total(model, inputs))
        handle.set_step(0, 2)
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with visattn.apply(model, "na(window=3x3)", dense_steps=1) as handle:
        wanted = both()
        model.train()
        model.enable_gradient_checkpointing()
        got = both()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_threads_recompute_their_own_forward():
    model, inputs = flux()
    with visattn.apply(model, "na(window=3x3)"):
        wanted = [torch.autograd.grad(total(model, each), model.x_embedder.weight)[0] for each in inputs]
        model.train()
        model.enable_gradient_checkpointing()
        found, both = {}, threading.Barrier(2)

        def work(i):
            loss = total(model, inputs[i])
            both.wait()
            found[i] = torch.autograd.grad(loss, model.x_embedder.weight)[0]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, gradient in enumerate(wanted):
        torch.testing.assert_close(found[i], gradient, rtol=1e-4, atol=1e-5)


def test_attention_called_outside_of_a_forward_is_stock():
    model, (inputs, _) = flux()
    block = model.single_transformer_blocks[0].attn
    tokens = tiny_models.noise(1, 41, 32)
    stock = block(hidden_states=tokens)
    with visattn.apply(model, "na(window=3x3)") as handle:
        tiny_models.run(model, inputs)
        assert torch.equal(block(hidden_states=tokens), stock)
    assert handle.report().fallbacks == {"called outside of the model's forward": 1}
