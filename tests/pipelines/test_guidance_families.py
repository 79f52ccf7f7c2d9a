"""Perturbed forwards of every model family: the identity is `na(window=1)` in some layers, and nothing stays."""

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_models
from visattn.pipelines.guidance.perturbing import Perturbation, perturbation_of
from visattn.pipelines.patch.install import patched_model

# guide() perturbs models that predict; what these return is from before their middle layers.
CONTROLS = {"controlnet", "controlnet_union", "flux_control", "flux_control_union", "sparse_control"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.FAMILIES if name not in CONTROLS])
def test_the_identity_is_a_window_of_one(name):
    build, _, _ = tiny_models.FAMILIES[name]
    model, inputs = build()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "dense"):
        patched = patched_model(model)
        found = {}
        for by in ("identity", "blur"):
            perturbation = Perturbation(patched, perturbation_of(by), None, None, 1.0)
            perturbation.begin()
            found[by] = tiny_models.run(model, inputs)
            perturbation.stop()
            perturbation.check_called()
            assert torch.isfinite(found[by]).all() and not torch.equal(found[by], stock)
        layers = list(perturbation.modules)
        assert torch.equal(tiny_models.run(model, inputs), stock)
    with visattn.apply(model, "na(window=1)", layers=layers, strict=True, always=True):
        torch.testing.assert_close(tiny_models.run(model, inputs), found["identity"], rtol=1e-5, atol=1e-5)
