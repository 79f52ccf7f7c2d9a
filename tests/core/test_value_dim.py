"""Values of other channels than the keys."""

import pytest
import torch

import visattn
from tests.support.cases import gradients, qkv
from visattn import Layout, attention, explain

LAYOUT = Layout((5, 6), 2)
TEXTS = [
    "na(window=3)",
    "clear(radius=2, pool=2)",
    "dense",
    "routing(regions=2x2, topk=2)",
    "topk(keep=2, block=2x3)",
    "agent(agents=2)",
    "sigmoid(sparse=na(window=3))",
]


def inputs(channels, seed=0):
    """q and k of 12 channels, v of others."""
    q, k, _ = qkv(LAYOUT, 4, 2, 12, grad=True, seed=seed)
    made = torch.Generator().manual_seed(seed + 1)
    v = torch.randn(1, LAYOUT.length, 2, channels, generator=made, dtype=q.dtype)
    return q, k, v.requires_grad_()


def in_parts(q, k, v, text, **more):
    """One call for each 12 channels of v, the last part filled up."""
    whole = torch.nn.functional.pad(v, (0, -v.shape[3] % 12))
    parts = [attention(q, k, part, text, LAYOUT, backend="auto", **more) for part in whole.split(12, 3)]
    return torch.cat(parts, 3)[..., : v.shape[3]]


@pytest.mark.parametrize("channels", [5, 16, 31])
@pytest.mark.parametrize("text", TEXTS)
def test_equal_calls_on_parts_of_the_values(text, channels):
    q, k, v = inputs(channels)
    out, right = attention(q, k, v, text, LAYOUT), in_parts(q, k, v, text)
    assert out.shape == (1, LAYOUT.length, 4, channels)
    assert torch.allclose(out, right, atol=1e-10)
    for a, b in zip(gradients(out, (q, k, v)), gradients(right, (q, k, v)), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_engines_masks_other_keys_and_the_log_sum_exp(backend):
    q, k, v = inputs(20)
    mask = torch.rand(1, LAYOUT.length, generator=torch.Generator().manual_seed(0)) < 0.7
    layout = Layout((4, 8), key_layout=LAYOUT)
    for _ in range(2):
        out, lse = attention(q, k, v, "na(3)", layout, key_mask=mask, backend=backend, return_lse=True, scale=0.4)
        right = attention(
            q, k, v[..., :12], "na(3)", layout, key_mask=mask, backend="reference", return_lse=True, scale=0.4
        )
        assert torch.allclose(out[..., :12], right[0]) and torch.allclose(lse, right[1])


def test_compiled():
    torch._dynamo.reset()
    q, k, v = inputs(20)
    run = lambda q, k, v: attention(q, k, v, "na(window=3)", LAYOUT)  # noqa: E731
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.allclose(found, run(q, k, v))
    for a, b in zip(gradients(found, (q, k, v)), gradients(run(q, k, v), (q, k, v)), strict=True):
        assert torch.allclose(a, b)


def test_weights_that_are_no_products_are_refused():
    q, k, v = inputs(20)
    for text in ("linear", "mala", "flow", "wersa", "sparselinear(sparse=na(window=3))"):
        with pytest.raises(
            ValueError, match=r"v has 20 channels and k 12, .*: cut v in parts of 12 channels, one call"
        ):
            attention(q, k, v, text, LAYOUT)
    with pytest.raises(ValueError, match="must agree in batch"):
        visattn.attention(q, k, v[:, 1:], "dense", LAYOUT)


def test_explain_knows_the_wider():
    q, _, _ = inputs(20)
    assert explain("na(window=3)", LAYOUT, q, value_dim=20).problem.head_dim == 20
    assert explain("na(window=3)", LAYOUT, q, value_dim=5).problem.head_dim == 12
