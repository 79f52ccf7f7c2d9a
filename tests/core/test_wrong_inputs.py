"""What is no input of a public function is told by its name, what was expected and the fix, before any work."""

import pytest
import torch

import visattn
from visattn import Layout, attention, attention_rows, explain
from visattn.parameters import PatternParameters
from visattn.patterns import parse
from visattn.runtime.call import AttentionCall
from visattn.selectors import selectors_of
from visattn.steps import check_step

LAYOUT = Layout((4, 5))
Q = torch.randn(1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
CALLS = [
    ({"parameters": {"bias": None}}, "bias is a NoneType: pass a torch tensor, or leave it out"),
    ({"parameters": {"bias": torch.ones(2).to_sparse()}}, "bias is a tensor of layout .*: pass it as bias.to_dense"),
    ({"key_mask": torch.ones(1, 20, dtype=torch.bool).to_sparse()}, "key_mask is a tensor of layout"),
    ({"return_lse": "no"}, "return_lse='no' must be True or False"),
]


@pytest.mark.parametrize(("given", "words"), CALLS)
def test_options_of_attention(given, words):
    with pytest.raises(ValueError, match=words):
        attention(Q, Q, Q, "sigmoid(sparse=na(window=3))", LAYOUT, **given)


@pytest.mark.parametrize("at", range(3))
def test_tensors_of_other_layouts(at):
    tensors = [Q.to_sparse() if i == at else Q for i in range(3)]
    with pytest.raises(ValueError, match=rf"{'qkv'[at]} is a tensor of layout torch.sparse_coo: pass it as"):
        attention(*tensors, "dense", LAYOUT)


@pytest.mark.parametrize("grid", [{4, 5}, {4: 1, 5: 1}.keys(), {4: 1, 5: 1}, True, (4, True)])
def test_grids_without_order_and_truths_are_no_grids(grid):
    with pytest.raises(ValueError, match="must be 1 to 3 whole numbers"):
        Layout(grid)


EXPLAINED = [
    ("dense", {"kv_heads": -2}, "kv_heads=-2 must be a whole number of at least 1, or None"),
    ("dense", {"kv_heads": "a"}, "kv_heads='a' must be"),
    ("dense", {"value_dim": 2.5}, "value_dim=2.5 must be"),
    ("dense", {"key_mask": torch.ones(1, 20, dtype=torch.bool)}, "key_mask is a Tensor but must be True or False"),
    ("linear", {"value_dim": 9}, "v has 9 channels and k 8, and linear.* takes as many of both"),
    ("clear(radius=2)", {"rpb": True}, "clear.* has no relative position bias"),
    ("na(window=3, circular=true)", {"rpb": True}, "an axis is circular"),
    ("na(window=3)", {"rpb": True, "key_layout": Layout((2, 2))}, "keys have a layout of their own"),
]


@pytest.mark.parametrize(("text", "given", "words"), EXPLAINED)
def test_explain_refuses_what_attention_does(text, given, words):
    with pytest.raises(ValueError, match=words):
        explain(text, LAYOUT, Q, **given)


@pytest.mark.parametrize("rows", [None, "a", torch.ones(20, dtype=torch.bool), [True, False], [0.5], [20], 3])
def test_rows_are_whole_numbers(rows):
    with pytest.raises(ValueError, match=r"rows.*must be whole numbers"):
        attention_rows(Q, Q, "dense", LAYOUT, rows)


def test_no_rows_are_rows():
    assert attention_rows(Q, Q, "dense", LAYOUT, []).shape == (1, 2, 0, 20)


def test_layers_steps_and_switches():
    with pytest.raises(ValueError, match=r"layers=3\.5 is no index, slice, range"):
        selectors_of(3.5)
    for step, total in (("a", None), (0.5, None), (True, 4), (1, 2.5)):
        with pytest.raises(ValueError, match="must be a whole number, or None"):
            check_step(step, total)
    with pytest.raises(ValueError, match="step=4 must be at least 0 and below the number of steps, total=4"):
        check_step(4, 4)
    with pytest.raises(ValueError, match="always='no' must be True or False"):
        visattn.apply(None, "dense", always="no")


def test_a_decay_beyond_the_dtype_leaves_each_position_to_itself():
    fastest = attention(Q, Q, Q, parse("linear(causal=1x0, decay=3e38)"), LAYOUT)
    assert torch.allclose(fastest, attention(Q, Q, Q, "linear(causal=1x0, decay=1000)", LAYOUT))
    assert fastest.isfinite().all()


@pytest.mark.parametrize("given", [None, 3, True])
def test_what_is_no_path(given):
    with pytest.raises(ValueError, match="pass the path of a file"):
        PatternParameters([]).load(given)


def test_calls_of_models_with_dtypes_that_differ_are_left_to_the_model():
    call = AttentionCall(Q.half(), Q, Q, None, None, False)
    assert call.refusal() == "its q is torch.float16, k torch.float32 and v torch.float32"
    assert call.of([Q, Q, Q]).refusal() == ""
