"""Masks in every shape that diffusers uses: those that only say which keys are valid run the pattern."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_models
from visattn.runtime.masks import key_validity

BATCH, TOKENS, HEADS = 2, 5, 3
Q = torch.zeros(BATCH, TOKENS, HEADS, 4)


def whole(mask):
    """A mask as stock attention applies it: [B, H, S, S], True where a pair is kept."""
    if list(mask.shape) == [BATCH, TOKENS]:
        mask = mask[:, None, None]
    return torch.broadcast_to(mask, (BATCH, HEADS, TOKENS, TOKENS))


def shaped(keys, shape):
    """Keys [B or 1, S] as a mask of a shape; its memory is its own or shared."""
    if len(shape) == 2:
        return keys.expand(shape)
    return keys[:, None, None].expand(shape) if len(shape) == 4 else keys[:1, None].expand(shape)


SHAPES = [
    (BATCH, TOKENS),
    (1, TOKENS),
    (TOKENS, TOKENS),
    (HEADS, 1, TOKENS),
    *[(b, h, q, TOKENS) for b in (1, BATCH) for h in (1, HEADS) for q in (1, TOKENS)],
]


@given(data=st.data())
def test_masks_of_keys_are_read_in_every_shape(data):
    shape = data.draw(st.sampled_from(SHAPES))
    apart = shape[0] if len(shape) == 4 or shape == (BATCH, TOKENS) else 1
    each = st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)
    keys = torch.tensor([data.draw(each) for _ in range(apart)])
    mask = shaped(keys, shape)
    if data.draw(st.booleans()):
        mask = mask.contiguous()
    kind = data.draw(st.sampled_from(["bool", "zero and minus infinity", "zero and minus ten thousand"]))
    if kind != "bool":
        off = float("-inf") if "infinity" in kind else -10_000.0
        mask = torch.where(mask, 0.0, off)
    found = key_validity(mask, Q, None)
    expected = whole(keys[:, None, None] if apart > 1 else keys[0])
    found = torch.ones(BATCH, TOKENS, dtype=torch.bool) if found is None else found
    assert torch.equal(torch.broadcast_to(found[:, None, None], expected.shape), expected)


@given(data=st.data())
def test_one_pair_that_differs_is_found(data):
    """Whatever a mask adds to its keys leaves the call dense, and the reason says what differs."""
    mask = torch.ones(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.bool)
    at = [data.draw(st.integers(0, n - 1)) for n in mask.shape]
    mask[tuple(at)] = False
    assert key_validity(mask, Q, None) == "its mask [2, 3, 5, 5] differs from head to head"
    assert key_validity(mask[:, at[1] : at[1] + 1], Q, None) == "its mask [2, 1, 5, 5] differs from query to query"


@pytest.mark.parametrize("shape", [(3, TOKENS), (BATCH, 2, 1, TOKENS), (BATCH, 1, 2, TOKENS), (1, 1, 1, 1, TOKENS)])
def test_shapes_that_stock_attention_refuses_are_no_masks(shape):
    assert key_validity(torch.ones(shape, dtype=torch.bool), Q, None) == f"its mask {list(shape)} is not a mask of keys"


def test_a_mask_that_can_mean_two_things_is_named():
    q = torch.zeros(TOKENS, TOKENS, HEADS, 4)
    found = key_validity(torch.eye(TOKENS, dtype=torch.bool), q, None)
    assert "can be one of each sample's keys or one of queries and keys" in found


def test_a_bias_equal_for_all_keys_is_none():
    assert key_validity(torch.ones(BATCH, 1, 1, TOKENS), Q, None) is None
    assert "a bias" in key_validity(torch.arange(5.0).expand(BATCH, TOKENS), Q, None)


def padded(*shape, tokens, valid):
    """A mask that hides the last tokens of the first sample."""
    keys = torch.ones(2, tokens, dtype=torch.bool)
    keys[0, valid:] = False
    return keys.reshape(shape) if len(shape) == 2 else keys[:, None, None].expand(shape).contiguous()


@pytest.mark.parametrize("shape", [(2, 53), (2, 1, 1, 53), (2, 2, 1, 53), (2, 2, 53, 53)])
def test_flux_is_sparse_under_masks_of_keys(shape, monkeypatch):
    model, inputs = tiny_models.flux()
    mask = padded(*shape, tokens=53, valid=50)
    with visattn.apply(model, "na(window=-1)", strict=True, backend="reference"):
        whole = tiny_models.run(model, inputs, joint_attention_kwargs={"attention_mask": mask})
    torch.testing.assert_close(
        whole,
        tiny_models.run(model, inputs, joint_attention_kwargs={"attention_mask": mask}),
        rtol=1e-4,
        atol=1e-5,
    )
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        sparse = tiny_models.run(model, inputs, joint_attention_kwargs={"attention_mask": mask})
        assert not handle.report().fallbacks
    assert not torch.allclose(sparse, whole)


def test_pixart_is_sparse_under_its_mask():
    model, inputs = tiny_models.pixart()
    mask = torch.ones(2, 48)
    mask[0, 40:] = 0
    with visattn.apply(model, "na(window=-1)", strict=True, backend="reference"):
        found = tiny_models.run(model, inputs, attention_mask=mask)
    torch.testing.assert_close(found, tiny_models.run(model, inputs, attention_mask=mask), rtol=1e-4, atol=1e-5)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        tiny_models.run(model, inputs, attention_mask=mask)
    assert handle.report().hits == 2
