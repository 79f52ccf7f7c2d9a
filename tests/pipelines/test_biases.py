"""Masks that models add to the logits: carried along where they are a row of keys, else the call stays stock."""

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_models, tiny_text_images
from tests.support.window_mask import window_mask


def chroma_mask():
    """Chroma's pipeline passes zeros and ones as floats, which torch's SDPA adds to the logits."""
    return torch.cat([torch.tensor([[1.0, 1, 1, 0, 0]]), torch.ones(1, 48)], 1)


def test_mask_that_is_a_bias_is_carried(monkeypatch):
    model, inputs = tiny_models.chroma()
    mask = chroma_mask()
    plain = tiny_models.run(model, inputs, attention_mask=mask)
    unmasked = tiny_models.run(model, inputs)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        sparse = tiny_models.run(model, inputs, attention_mask=mask)
        assert not handle.report().fallbacks
        assert {call.problem.head_dim for site in handle.report().sites for call in site.calls} == {24}
        weight = model.transformer_blocks[0].attn.to_q.weight
        (gradient,) = torch.autograd.grad(model(**inputs, attention_mask=mask).sample.square().sum(), [weight])
    assert not torch.allclose(plain, unmasked) and not torch.allclose(sparse, plain)
    real = torch.nn.functional.scaled_dot_product_attention

    def with_window(query, key, value, attn_mask, *args, **options):
        outside = ~window_mask((6, 8), (3, 3), 5, 0)
        return real(query, key, value, attn_mask.masked_fill(outside, float("-inf")), *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_window)
    torch.testing.assert_close(tiny_models.run(model, inputs, attention_mask=mask), sparse, rtol=2e-4, atol=2e-5)
    (expected,) = torch.autograd.grad(model(**inputs, attention_mask=mask).sample.square().sum(), [weight])
    torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_text_images.cogview4, tiny_text_images.glm_image])
def test_mask_of_text_that_becomes_a_bias_is_carried(build, monkeypatch):
    model, inputs = build(batch=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    plain = tiny_models.run(model, inputs, attention_mask=mask)
    assert not torch.allclose(plain, tiny_models.run(model, inputs))
    with visattn.apply(model, "na(window=-1)", strict=True, backend="reference"):
        torch.testing.assert_close(tiny_models.run(model, inputs, attention_mask=mask), plain, rtol=2e-4, atol=2e-5)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        sparse = tiny_models.run(model, inputs, attention_mask=mask)
        assert not handle.report().fallbacks
    real = torch.nn.functional.scaled_dot_product_attention

    def with_window(query, key, value, attn_mask, *args, **options):
        outside = ~window_mask((6, 8), (3, 3), 5, 0)
        return real(query, key, value, attn_mask.masked_fill(outside, float("-inf")), *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", with_window)
    torch.testing.assert_close(tiny_models.run(model, inputs, attention_mask=mask), sparse, rtol=2e-4, atol=2e-5)


def test_bias_carried_in_half_precision_is_that_of_the_mask():
    from visattn.runtime.masks import carry_bias, key_validity

    q, k, v = (tiny_models.noise(1, 9, 2, 20, seed=i).bfloat16() * 0.1 for i in range(3))
    row = torch.tensor([[1.0] * 4 + [0.0] * 2 + [1.0] * 3])
    mask = (row[:, :, None] * row[:, None]).bfloat16()[:, None]
    assert torch.equal(key_validity(mask, q, -1), row.bfloat16())
    a, b, c = (t.double() for t in carry_bias(q, k, v, row, 20**-0.5))
    logits = torch.einsum("bqhd,bkhd->bhqk", a, b) * 20**-0.5
    expected = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 20**-0.5 + mask.double()
    # 1 / scale alone would be off by 2e-3 in bfloat16.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(c[..., :20], v.double()) and not c[..., 20:].any()


def test_other_biases_fall_back():
    from visattn.runtime.masks import key_validity

    q = torch.zeros(1, 3, 1, 4)
    bias = torch.tensor([0.0, 1.0, 2.0])
    why = "its mask [1, 1, 3, 3] is a bias, not a mask of keys"
    assert key_validity((bias[:, None] * bias)[None, None], q, -1) == why
    assert key_validity(torch.eye(3)[None, None], q, -1) == why
    assert key_validity(torch.ones(1, 1, 3, 3), q, -1) is None
    assert key_validity(bias[None, None, None], q, None) == "its mask [1, 1, 1, 3] is a bias, not a mask of keys"
    model, inputs = tiny_models.chroma()
    stock = tiny_models.run(model, inputs, attention_mask=chroma_mask() * 2)
    with visattn.apply(model, "na(window=3x3)") as handle, pytest.warns(UserWarning, match="a bias"):
        assert torch.equal(tiny_models.run(model, inputs, attention_mask=chroma_mask() * 2), stock)
        assert list(handle.report().fallbacks) == ["its mask [1, 1, 53, 53] is a bias, not a mask of keys"]
