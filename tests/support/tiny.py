"""What tiny random models share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


def seeded(make, *args, **kwargs):
    """Build a model with reproducible random weights, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Output layers that start at zero would hide every difference.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def released(name):
    """A class of diffusers; skips the test where the installed release does not have it yet."""
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)
