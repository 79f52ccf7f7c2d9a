"""Swapped models give an empty batch an empty result, and its gradient an empty one."""

import pytest
import timm
import torch

import visattn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}


PATTERNS = ("na(window=3)", "routing(regions=2, topk=1)", "agent(agents=2)", "linear")
CASES = [
    *(("vit_tiny_patch16_224", {}, pattern) for pattern in PATTERNS),
    ("vit_tiny_patch16_224", {"qk_norm": True, "class_token": False, "global_pool": "avg"}, PATTERNS[0]),
    ("eva02_tiny_patch14_224", {}, PATTERNS[1]),
    ("beit_base_patch16_224", {}, PATTERNS[0]),
]


@pytest.mark.parametrize(("kind", "options", "pattern"), CASES)
def test_an_empty_batch_gives_an_empty_result(kind, options, pattern):
    model = timm.create_model(kind, **SMALL, **options)
    x = torch.zeros(0, 3, 32, 32, requires_grad=True)
    with visattn.apply(model, pattern) as handle:
        out = model(x)
        out.sum().backward()
        assert out.shape == (0, 5) and x.grad.shape == x.shape
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        assert pattern.partition("(")[0] in str(handle.report())
        assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()
