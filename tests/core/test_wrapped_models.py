"""Gates and temperatures in models: they start as the pattern inside, learn, are kept in a file, and are undone."""

import copy

import pytest
import timm
import torch

import visattn
from tests.golden.fill import fill
from tests.support import tiny_towers
from tests.support.tiny_edits import joy_image, joy_image_plus
from tests.support.tiny_flux import flux


def vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, embed_dim=24, num_heads=3)
    return fill(model), {"x": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))}


def run(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("make", [vit, flux])
@pytest.mark.parametrize("outer", ["gated", "selective"])
def test_a_model_starts_learns_keeps_and_forgets(make, outer, tmp_path):
    model, inputs = make()
    model.requires_grad_(False)
    form = f"{outer}(of=na(window=3x3))"
    with torch.no_grad():
        stock = run(model, inputs)
        with visattn.apply(model, "na(window=3x3)", always=True):
            sparse = run(model, inputs)
    assert (sparse - stock).abs().max() > 1e-3
    with visattn.apply(model, form) as handle:
        out = run(model, inputs)
        assert (out - sparse).abs().max() < 1e-5
        (out - stock).square().mean().backward()
        learned = list(handle.parameters.parameters())
        assert learned and all(p.grad is not None and p.grad.isfinite().all() for p in learned)
        assert any(p.grad.abs().max() > 0 for p in learned)
        with torch.no_grad():
            for parameter in learned:
                parameter += 0.3
            moved = run(model, inputs)
        handle.save(tmp_path / "factors.safetensors")
    with visattn.apply(model, form, weights=tmp_path / "factors.safetensors"), torch.no_grad():
        again = run(model, inputs)
    assert torch.equal(again, moved) and (moved - sparse).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("make", [joy_image, joy_image_plus])
def test_modules_whose_projections_have_names_of_their_own_tell_their_heads(make):
    model, inputs = make()
    with torch.no_grad(), visattn.apply(model, "gated(of=na(window=3x3))", strict=True) as handle:
        run(model, inputs)
        assert handle.report().sites_hit == len(handle.report().sites) == 2


def test_blocks_around_an_attention_tell_its_heads():
    model, x = tiny_towers.make("timesformer"), tiny_towers.inputs("timesformer")
    with torch.no_grad(), visattn.apply(model, "gated(of=na(window=3x3))", strict=True) as handle:
        model(**x)
        assert handle.report().sites_hit == 2


def towers():
    return tiny_towers.make("vit"), "visattn.clients.transformers.install.make_parameters"


def swapped():
    return vit()[0], "visattn.models.swap.install.make_parameters"


def patched():
    return flux()[0], "visattn.pipelines.patch.sites.make_parameters"


@pytest.mark.parametrize("make", [towers, swapped, patched])
def test_first_parameters_do_not_depend_on_defaults_and_modes_of_torch(make):
    model, _ = make()
    pattern = "wersa"

    def first():
        with visattn.apply(model, pattern) as handle:
            return [p for site in handle.parameters for p in handle.parameters[site].values()]

    true = first()
    assert true
    for mode in (torch.inference_mode(), torch.device("meta")):
        with mode:
            found = first()
        assert not any(p.is_inference() for p in found)
        assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
    torch.set_default_dtype(torch.float64)
    try:
        found = first()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, true, strict=True))


def test_parameters_keep_their_values_when_a_model_is_asked_for_shapes():
    model, inputs = vit()
    x = inputs["x"]
    meta = copy.deepcopy(model).to("meta")
    with torch.no_grad(), visattn.apply(model, "sigmoid", strict=True):
        true = model(x)
    with torch.no_grad(), visattn.apply(meta, "sigmoid", strict=True):
        assert meta(x.to("meta")).shape == true.shape
        meta.to_empty(device="cpu")
        meta.load_state_dict(model.state_dict())
        torch.testing.assert_close(meta(x), true)


@pytest.mark.parametrize("make", [towers, swapped, patched])
def test_what_is_refused_leaves_no_trace(make, monkeypatch):
    """A module that does not tell its heads, behind one that does."""
    import importlib

    model, name = make()
    home, _, function = name.rpartition(".")
    real, called = getattr(importlib.import_module(home), function), []

    def make_parameters(*args):
        called.append(args)
        if len(called) == 2:
            raise ValueError("it does not tell its heads")
        return real(*args)

    def state():
        return [(type(m), sorted(m.__dict__), [*m._forward_hooks, *m._forward_pre_hooks]) for m in model.modules()]

    before = state()
    monkeypatch.setattr(importlib.import_module(home), function, make_parameters)
    with pytest.raises(ValueError, match="does not tell its heads"):
        visattn.apply(model, "gated(of=na(window=3x3))")
    assert state() == before
    visattn.apply(model, "gated(of=na(window=3x3))").remove()
    assert state() == before
