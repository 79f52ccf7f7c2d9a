"""Which calls the Hopper kernels take; that they are right is checked on such a GPU by scripts/check/lists_gpu.py."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from visattn import Layout, parse

pytest.importorskip("triton")

from visattn.dispatch import load
from visattn.kernels.triton import backend as engine
from visattn.kernels.triton.arguments import plan_of
from visattn.kernels.triton.config import DIRECTIONS, HOPPER, config
from visattn.kernels.triton.hopper.launch import copyable, faster_configs, folded, hopper_config
from visattn.kernels.triton.hopper.masks import by_threads, thread_masks
from visattn.kernels.triton.lists.program import pack
from visattn.problem import Call, Problem


def chosen(pattern, layout, arch=90, dtype=torch.bfloat16, dim=128, direction="forward"):
    return hopper_config(arch, dtype, dim, parse(pattern), layout, direction)


@pytest.mark.parametrize("direction", HOPPER)
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("na(window=9x9)", Layout((37, 45), 13, 5)),
        ("na(window=16x16,stride=8x8)", Layout((64, 64))),
        ("na(window=5x7x9)", Layout((9, 21, 40), suffix=77)),
        ("clear(radius=5,pool=2)", Layout((32, 48))),
        ("radial(decay=0.5)", Layout((9, 16, 20))),
        ("dense", Layout(3000)),
    ],
)
def test_takes_lists_of_whole_boxes(pattern, layout, direction):
    assert chosen(pattern, layout, direction=direction) == HOPPER[direction][128]
    # dQ at head dim 64 is faster by the general kernel where few tiles have masks.
    plain = pattern in ("radial(decay=0.5)", "dense") and direction == "query_grad"
    expected = None if plain else HOPPER[direction][64]
    assert chosen(pattern, layout, dim=64, dtype=torch.float16, direction=direction) == expected


@pytest.mark.parametrize("direction", HOPPER)
@pytest.mark.parametrize(
    "other", [{"arch": 80}, {"arch": 100}, {"dtype": torch.float32}, {"dim": 32}, {"dim": 84}, {"dim": 256}]
)
def test_leaves_other_gpus_dtypes_and_head_dims(other, direction):
    assert chosen("na(window=9x9)", Layout((64, 64)), direction=direction, **other) is None


@pytest.mark.parametrize("direction", HOPPER)
def test_pads_head_dims_to_the_channels_that_it_computes_with(direction):
    for dim, channels in ((40, 64), (56, 64), (72, 128), (80, 128), (96, 128), (120, 128)):
        assert chosen("na(window=9x9)", Layout((64, 64)), dim=dim, direction=direction) == HOPPER[direction][channels]


@pytest.mark.parametrize("direction", HOPPER)
@pytest.mark.parametrize("pattern", ["routing(regions=8x8,topk=4)", "na(window=9x9,dilation=2)"])
def test_leaves_routed_and_dilated_patterns(pattern, direction):
    assert chosen(pattern, Layout((64, 64)), direction=direction) is None


@pytest.mark.parametrize(
    ("pattern", "layout", "directions"),
    [
        ("topk(keep=0.1,block=8x16)", Layout((37, 45), 13, 5), set(HOPPER)),
        ("topp(p=0.7,block=4x4x8,key_block=4x4x4)", Layout((9, 21, 40), suffix=77), {"forward", "query_grad"}),
        ("above(tau=1,block=256,key_block=64)", Layout(3000), {"forward", "query_grad"}),
        ("topk(keep=0.1,block=64,key_block=256)", Layout(3000), {"key_grad"}),
        ("topk(keep=0.1,block=8x16,rest=mean)", Layout((64, 64)), set(HOPPER)),
        # Half of the kernels' rows would be idle, and boxes are no powers of two.
        ("topk(keep=0.1)", Layout((64, 64)), set()),
        ("topk(keep=0.1,block=8x12)", Layout((64, 48)), set()),
    ],
)
def test_takes_lists_per_head_whose_blocks_fill_its_rows(pattern, layout, directions):
    taken = {direction for direction in HOPPER if chosen(pattern, layout, direction=direction)}
    assert taken == directions
    for direction in taken:
        made = plan_of(parse(pattern), layout, direction, HOPPER[direction][128])
        rows = made.keys if direction == "key_grad" else made.queries
        assert rows.capacity == 128


def directions_of(q, kv, **options):
    call = Call(parse("na(window=9x9)"), Layout((32, 32)), **({"scale": 0.1} | options))
    return set(faster_configs(q, kv, kv, call, 90))


def test_which_kernels_of_a_call():
    x = torch.empty(2, 1024, 4, 128, dtype=torch.bfloat16)
    assert directions_of(x, x) == set(HOPPER)
    assert directions_of(x, x[:, :, :2]) == {"forward", "query_grad"}, "a dK/dV program has one query head"
    odd = torch.empty(2, 1024, 4, 132, dtype=torch.bfloat16)[..., :128]
    assert directions_of(odd, x) == {"forward", "query_grad"}, "copies cannot address the queries"
    assert directions_of(x, odd) == {"key_grad"}, "copies cannot address the keys"
    assert directions_of(x, x, key_mask=torch.ones(2, 1024)) == set(HOPPER)
    for other in ({"scale": 0.0}, {"rpb": torch.ones(4, 17, 17)}):
        assert directions_of(x, x, **other) == set()


def test_what_copies_can_address():
    x = torch.empty(2, 40, 3, 64, dtype=torch.bfloat16)
    heads_first = torch.empty(2, 3, 40, 64, dtype=torch.bfloat16).transpose(1, 2)
    packed = torch.empty(2, 40, 3, 3, 64, dtype=torch.bfloat16).unbind(2)
    assert copyable(x, x) and copyable(heads_first, heads_first) and copyable(packed[1], packed[2])
    assert folded(x) and not folded(heads_first) and not folded(x[:1])
    assert not copyable(x, heads_first)
    odd = torch.empty(2, 40, 3, 68, dtype=torch.bfloat16)
    assert not copyable(odd[..., :64], odd[..., :64]), "tokens are not a multiple of 16 bytes apart"
    shifted = torch.empty(2 * 40 * 3 * 64 + 4, dtype=torch.bfloat16)[4:].view(2, 40, 3, 64)
    assert not copyable(x, shifted), "it does not begin at a multiple of 16 bytes"
    assert not copyable(x[:, :, :1].expand(-1, -1, 3, -1), x), "heads share their memory"


def test_the_tuned_configurations_stay_as_they_are(monkeypatch):
    tuned = {direction: config(90, torch.bfloat16, 128, direction) for direction in DIRECTIONS}
    kept = dict(tuned)
    monkeypatch.setattr(engine, "architecture", lambda device=None: 90)
    monkeypatch.setattr(engine.tune, "enabled", lambda: True)
    monkeypatch.setattr(engine, "_tuned", lambda *_: tuned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q = Mock(wraps=torch.empty(1, 1024, 2, 128, dtype=torch.bfloat16), is_cuda=True, device=torch.device("cuda", 0))
    q.dtype, q.shape = torch.bfloat16, torch.Size((1, 1024, 2, 128))
    k = torch.empty(1, 1024, 2, 128, dtype=torch.bfloat16)
    found = engine.launches(q, k, k, Call(parse("na(window=9x9)"), Layout((32, 32)), 0.1))
    assert found["forward"] == HOPPER["forward"][128] and tuned == kept


def test_its_rate_decides_whether_dense_attention_is_faster(monkeypatch):
    monkeypatch.setattr(engine, "architecture", lambda device=None: 90)
    monkeypatch.setattr(engine, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend = load("triton")
    given = parse("na(window=80x80)"), Layout((256, 256)), 1, 24, 24, 128, torch.bfloat16, "cuda"
    general = backend.cost(Problem(*given, rpb=True))
    assert backend.cost(Problem(*given)) == backend.cost(Problem(*given, key_mask=True)) < 0.75 * general


def test_a_threads_bits_of_a_mask_lie_side_by_side():
    seen = np.random.default_rng(0).random((5, 128, 64)) < 0.5
    words = by_threads(torch.from_numpy(pack(seen, 128, 64))).numpy().view("u2")
    for column in range(64):
        eight, thread, side = column // 8, column % 8 // 2, column % 2
        bit = words[:, :, thread] >> (2 * eight + side) & 1
        assert (bit == seen[:, :, column]).all()
    masks = torch.from_numpy(pack(seen, 128, 64))
    assert thread_masks(masks) is thread_masks(masks) and thread_masks(masks).equal(by_threads(masks))
