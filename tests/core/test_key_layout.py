"""Calls whose keys have a layout of their own, in the ways calls are made: compiled, transformed, derived twice."""

import pytest
import torch

from tests.support.cases import qkv
from visattn import attention, attention_rows, dense_mask
from visattn.kernels.triton.config import EIGHT_HOPPER
from visattn.kernels.triton.eightbit.run import eight_config
from visattn.kernels.triton.hopper.launch import hopper_config
from visattn.layout import Layout
from visattn.patterns import parse
from visattn.show import draw

LAYOUT = Layout((6, 8), 1, 2)
KEYS = Layout((3, 4), 0, 5)
TEXTS = ["na(window=2x3)", "clear(radius=2, pool=2)", "halo(block=2, halo=1, circular=0x1)", "dense"]


def truth(q, k, v, text, layout, scale):
    """Masked attention of plain operators, without pooled keys."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = logits.masked_fill(~dense_mask(text, layout), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("text", TEXTS)
def test_compiled_calls_are_one_operator(text):
    q, k, v = qkv(LAYOUT.with_keys(KEYS), dtype=torch.float32, grad=True)

    def run(q, k, v):
        return attention(q, k, v, text, LAYOUT, key_layout=KEYS)

    out, right = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    assert torch.allclose(out, right, atol=1e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found, wanted = (torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (out, right))
    assert all(torch.allclose(a, b, atol=1e-5) and a.shape == b.shape for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_a_window_that_covers_the_queries_grid_and_not_the_keys_is_no_dense_attention(backend):
    layout = Layout((2, 2), key_layout=Layout((4, 4)))
    q, k, v = qkv(layout)
    found = attention(q, k, v, "na(window=3)", layout, backend=backend, scale=0.5)
    assert torch.allclose(found, truth(q, k, v, "na(window=3)", layout, 0.5), atol=1e-6)


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
@pytest.mark.parametrize(
    "text", ["na(window=2x3)", "halo(block=2, halo=1, circular=0x1)", "na(window=3, circular=1x0)"]
)
def test_second_derivatives(text, backend):
    layout = Layout((3, 4), 1, key_layout=Layout((2, 4), 0, 1))
    inputs = qkv(layout, dim=3, grad=True)

    def squares(call):
        loss = call(*inputs).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    ours = squares(lambda q, k, v: attention(q, k, v, text, layout, backend=backend, scale=0.5))
    right = squares(lambda q, k, v: truth(q, k, v, text, layout, 0.5))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(ours, right, strict=True))


def test_weights_of_cells_are_of_the_grid_of_the_keys():
    layout = Layout((6, 8), 1, 2)
    q, k, v = qkv(layout.with_keys(KEYS))
    weight = torch.full((3, 2), 1 / 6, dtype=q.dtype)
    found = attention(q, k, v, "clear(radius=2, pool=-1x2)", layout, key_layout=KEYS, pool_weight=weight)
    # Equal weights are the mean.
    assert torch.allclose(found, attention(q, k, v, "clear(radius=2, pool=-1x2)", layout, key_layout=KEYS))
    with pytest.raises(ValueError, match=r"pool_weight is \[6, 2\].*takes \[3, 2\]"):
        attention(q, k, v, "clear(radius=2, pool=-1x2)", layout, key_layout=KEYS, pool_weight=torch.ones(6, 2))


@pytest.mark.parametrize("text", TEXTS)
def test_transforms(text):
    q, k, v = (torch.stack([t, 2 * t]) for t in qkv(LAYOUT.with_keys(KEYS)))
    one = lambda q, k, v: attention(q, k, v, text, LAYOUT, key_layout=KEYS)  # noqa: E731
    each = torch.func.vmap(one)(q, k, v)
    assert torch.allclose(each, torch.stack([one(*t) for t in zip(q, k, v, strict=True)]))
    grads = torch.func.vmap(torch.func.grad(lambda *t: one(*t).sum(), (0, 1, 2)))(q, k, v)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("text", TEXTS)
def test_rows_are_the_weights(text):
    layout = LAYOUT.with_keys(KEYS)
    q, k, v = qkv(layout)
    rows = [0, 3, 20, layout.length - 1]
    weights = attention_rows(q, k, text, layout, rows)
    assert weights.shape == (1, 2, 4, KEYS.length)
    out = torch.einsum("bhrk,bkhd->brhd", weights, v)
    assert torch.allclose(out, attention(q, k, v, text, layout)[:, rows])


def test_key_masks_and_autocast():
    layout = LAYOUT.with_keys(KEYS)
    q, k, v = qkv(layout, dtype=torch.float32, batch=2)
    mask = torch.rand(2, KEYS.length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = False
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(q, k, v, TEXTS[0], layout, key_mask=mask)
        assert out.dtype == torch.bfloat16 and not out[0].any()
        right = attention(q, k, v, TEXTS[0], layout, key_mask=mask, backend="reference")
        assert (out.float() - right).abs().max() < 0.03


def test_pictures_show_the_keys():
    image = draw("na(window=3x3)", LAYOUT.with_keys(KEYS), query=(2, 5))
    assert image.size[0] > 100


def test_hopper_kernels_take_keys_on_another_grid():
    layout, asked = Layout((32, 32)), (90, torch.bfloat16, 128, parse("na(window=16x16)"))
    other = layout.with_keys(Layout((64, 48)))
    assert hopper_config(*asked, other) is hopper_config(*asked, layout) is not None
    assert eight_config(*asked, other, False) is eight_config(*asked, layout, False) is EIGHT_HOPPER[128]


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference", "auto"])
def test_a_window_over_the_queries_grid_is_not_all_of_a_finer_one(backend):
    layout = Layout((3, 3), key_layout=Layout((9, 9)))
    q, k, v = qkv(layout)
    out = attention(q, k, v, "na(window=3)", layout, backend=backend, scale=0.5)
    assert torch.allclose(out, truth(q, k, v, "na(window=3)", layout, 0.5))
