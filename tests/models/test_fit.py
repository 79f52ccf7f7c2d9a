"""FIT against its authors' outputs, and its formula: one group, token and head at a time, in float64."""

from pathlib import Path

import pytest

pytest.importorskip("timm")

import timm
import torch
from torch.nn import functional as F

import visattn.models
from tests.golden.fill import fill, make_input
from visattn.models.backbones.fit import layer_counts
from visattn.models.backbones.fit_denoiser import FITDenoiser

assert "fit" in visattn.models.__all__


def slow_attention(part, x, others):
    """Tokens [S, dim] to others [N, other], one head and query at a time."""
    q, k, v = part.query(x), part.key(others), part.value(others)
    width = q.shape[1] // part.heads
    rows = []
    for i in range(len(x)):
        cells = []
        for h in range(part.heads):
            at = slice(h * width, (h + 1) * width)
            cells.append((k[:, at] @ q[i, at] / width**0.5).softmax(0) @ v[:, at])
        rows.append(torch.cat(cells))
    return part.output(torch.stack(rows))


def slow_layer(layer, x):
    y = layer.mha_ln(x)
    x = x + slow_attention(layer.mha, y, y)
    return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.mlp_ln(x))))


def slow_cross(part, x, others):
    return x + slow_attention(part.cross_mha, part.cross_ln(x), part.enc_ln(others))


def slow_fit(model, image):
    """Normed tokens [rows, columns, dim] of one image [C, H, W] of as many groups as the model was made for."""
    patch, side = model.stem.proj.kernel_size[0], model.group
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    groups = {}
    for r in range(rows):
        for c in range(columns):
            pixels = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            token = torch.einsum("cxy,dcxy->d", pixels, model.stem.proj.weight) + model.stem.proj.bias
            place = model.x_pos_emb[r % side * side + c % side]
            groups.setdefault((r // side, c // side), []).append(model.stem_ln(token) + place)
    groups = {where: torch.stack(tokens) for where, tokens in sorted(groups.items())}
    latents = {where: model.latent_pos_emb[where[0] * model.side + where[1]] for where in groups}
    for i, stage in enumerate(model.stages):
        for layer in stage.x_network:
            groups = {where: slow_layer(layer, x) for where, x in groups.items()}
        if i == len(model.stages) - 1:
            break
        latents = {where: slow_cross(stage.l2x_cross_attn, latents[where], x) for where, x in groups.items()}
        whole = torch.cat(list(latents.values()))
        for layer in stage.l_network:
            whole = slow_layer(layer, whole)
        latents = dict(zip(latents, whole.split(model.latents), strict=True))
        groups = {where: slow_cross(stage.x2l_cross_attn, x, latents[where]) for where, x in groups.items()}
    out = torch.stack(
        [
            torch.stack([groups[r // side, c // side][r % side * side + c % side] for c in range(columns)])
            for r in range(rows)
        ]
    )
    return model.norm(out)


def test_it_equals_its_formula():
    options = {"img_size": 16, "patch_size": 4, "group": 2, "latents": 3, "embed_dim": 12, "latent_dim": 8}
    model = fill(
        timm.create_model("fit_small", layers="(1)2(2)1(1)", num_heads=(3, 2), num_classes=4, **options)
    ).double()
    x = make_input((2, 3, 16, 16), 0).double()
    found = model.forward_features(x).unflatten(1, (4, 4))
    truth = torch.stack([slow_fit(model, image) for image in x])
    assert (found - truth).abs().max() < 1e-9
    # What is far is read through the latents.
    x[:, :, 12:, 12:] += 1
    assert (model.forward_features(x).unflatten(1, (4, 4)) - found)[:, 0, 0].abs().max() > 1e-4
    logits = model(x)
    assert torch.allclose(logits, model.head(model.forward_features(x).mean(1))) and logits.shape == (2, 4)


def test_outputs_of_the_authors_code():
    golden = torch.load(Path(__file__).parents[1] / "golden" / "fit_micro.pt", weights_only=True)
    model = fill(timm.create_model("fit_small", num_classes=0, **golden["config"])).double()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == golden["keys"]
    x = make_input(golden["input_shape"], golden["input_seed"]).double()
    # TensorFlow rounds constants of the GELU to float32.
    assert (model.forward_features(x) - golden["output"]).abs().max() < 1e-6


DENOISER = torch.load(Path(__file__).parents[1] / "golden" / "fit_denoiser_micro.pt", weights_only=True)


def denoiser(**more):
    return fill(FITDenoiser(**{**DENOISER["config"], **more})).double()


def noisy():
    """What the denoiser's outputs are of."""
    shapes, seeds = DENOISER["input_shapes"], DENOISER["input_seeds"]
    found = {name: make_input(shape, seeds[name]).double() for name, shape in shapes.items()}
    return {**found, "time": torch.tensor(DENOISER["time"], dtype=torch.float64)}


def test_outputs_of_the_authors_denoiser():
    model = denoiser()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == DENOISER["keys"]
    pictures, latents = model(**noisy())
    assert (pictures - DENOISER["output"]).abs().max() < 1e-6 and (latents - DENOISER["latents"]).abs().max() < 1e-6


def test_the_denoiser_reads_time_and_conditions():
    inputs = noisy()
    before = inputs.pop("latents_prev")
    model = denoiser(out_chans=2)
    pictures, latents = model(**inputs)
    assert pictures.shape == (2, 2, 16, 16) and latents.shape == before.shape
    for name in ("time", "cond", "x"):
        moved = {**inputs, name: inputs[name] + 0.1 * torch.arange(2).view(-1, *[1] * (inputs[name].ndim - 1))}
        change = (model(**moved)[0] - pictures).abs().amax((1, 2, 3))
        assert change[0] < 1e-12 and change[1] > 1e-3, name
    one = {**inputs, "cond": inputs["cond"][:, 0]}
    assert (model(**one)[0] - model(**{**inputs, "cond": inputs["cond"][:, :1]})[0]).abs().max() < 1e-12
    # Other sizes resample what was learned for this one.
    larger = {**inputs, "x": make_input((2, 3, 24, 16), 4).double()}
    assert model(**larger)[0].shape == (2, 2, 24, 16) and model(**larger)[1].shape == (2, 6, 3, 16)
    model.train()(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "prev" not in n)
    with pytest.raises(ValueError, match="no whole groups of 2 x 2"):
        model(**{**inputs, "x": make_input((2, 3, 20, 16), 4).double()})
    with pytest.raises(ValueError, match="latents_prev is for a model with self_cond=True"):
        denoiser(self_cond=False)(**inputs, latents_prev=before)
    with pytest.raises(ValueError, match="latent_dim 12 must be a multiple of 8"):
        denoiser(latent_dim=12)


def test_layers_as_text():
    assert layer_counts("(2)4(3)1(5)") == [(2, 4), (3, 1), (5, 0)] and layer_counts("(4)") == [(4, 0)]
    assert layer_counts("(0)4(1)") == [(0, 4), (1, 0)]
    for wrong in ("(2)4", "2", "(2)0(1)", "(0)", "", "(2)4(x)"):
        with pytest.raises(ValueError, match="must be numbers of local layers in parentheses"):
            layer_counts(wrong)
    with pytest.raises(ValueError, match="embed_dim 12 must be a multiple of the 5 heads"):
        timm.create_model("fit_small", embed_dim=12, latent_dim=12, num_heads=(5, 3))
