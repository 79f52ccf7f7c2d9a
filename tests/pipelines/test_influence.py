"""A changed token changes exactly the tokens whose window holds it: sites, prefix, order and axes are right."""

import math

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.pipelines.test_families import window_mask
from tests.support import tiny_models, tiny_text_images

BLOCKS = ("transformer_blocks", "joint_transformer_blocks", "layers", "single_transformer_blocks")


def with_one_layer(build):
    model, inputs = build()
    first, *others = [name for name in BLOCKS if hasattr(model, name)]
    setattr(model, first, getattr(model, first)[:1])
    for blocks in getattr(model, "mode_blocks", {}).values():
        del blocks[:]
    for name in others:
        setattr(model, name, torch.nn.ModuleList())
    return model, inputs


def tokens(latents, patch):
    """Latents [B, C, ..., H, W] as tokens [tokens, values] of the last sample.

    Of tokens [B, N, C] those of the image, which are the last.
    """
    latents = latents[-1]
    if latents.ndim == 2:
        return latents[-48:]
    for axis, size in zip(range(1, latents.ndim), patch, strict=True):
        latents = latents.unfold(axis, size, size)
    dims = len(patch)
    return latents.movedim(0, dims).reshape(math.prod(latents.shape[1 : dims + 1]), -1)


@pytest.mark.parametrize("name", tiny_text_images.TEXT_IMAGES)
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_a_token_reaches_the_queries_whose_window_holds_it(name, place):
    build, _, pattern = tiny_text_images.TEXT_IMAGES[name]
    model, inputs = with_one_layer(build)
    grid, patch = ((3, 4, 6), (1, 2, 2)) if name.endswith("refiner") else ((6, 8), (2, 2))
    changed = inputs["hidden_states"].clone()
    token = round(place * (math.prod(grid) - 1))
    if changed.ndim == 3:
        changed[-1, changed.shape[1] - math.prod(grid) + token] += 3
    else:
        at = [slice(i * p, i * p + p) for i, p in zip(divmods(token, grid), patch, strict=True)]
        changed[(-1, slice(None), *at)] += 3
    with visattn.apply(model, pattern, strict=True):
        before = tiny_models.run(model, inputs)
        after = tiny_models.run(model, inputs, hidden_states=changed)
    reached = (tokens(before, patch) != tokens(after, patch)).any(1)
    assert torch.equal(reached, window_mask(grid, (3,) * len(grid), 0, 0)[:, token])
    stock = tokens(tiny_models.run(model, inputs), patch) != tokens(
        tiny_models.run(model, inputs, hidden_states=changed), patch
    )
    assert stock.any(1).all()


def divmods(token, grid):
    """The coordinates of a token."""
    place = []
    for n in reversed(grid):
        token, rest = divmod(token, n)
        place.insert(0, rest)
    return place
