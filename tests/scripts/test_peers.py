"""Peers of the GPU benchmarks: compared with our results before they are timed, refused with a reason."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from scripts.bench import peers
from visattn import Layout, attention
from visattn.problem import Support

GRID, PATTERN = Layout((8, 8)), "na(window=5x5,stride=2x2)"


def tensors():
    return list(torch.randn(3, 1, GRID.length, 2, 16, generator=torch.Generator().manual_seed(0)))


def ours(q, k, v):
    return attention(q, k, v, PATTERN, GRID, backend="reference")


def test_a_peer_that_computes_the_same_is_taken():
    contender = peers.peer("tiles", PATTERN, GRID, tensors())
    assert peers.checked(contender, ours) is contender


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda q, k, v: ours(q, k, v) * 1.1, "output"),
        (lambda q, k, v: ours(q.detach() + 0 * q, k, v), "dQ"),
        (lambda q, k, v: ours(q, k, v) + 0 * k.sum() / 0, "output"),
    ],
)
def test_a_peer_that_computes_something_else_is_not(wrong, what):
    with pytest.raises(ValueError, match=f"its {what} is off by"):
        peers.checked((wrong, tensors()), ours)


def test_a_backend_that_hands_the_call_on_is_no_peer():
    def handed_on(q, k, v):
        warnings.warn("triton runs what FlashAttention-4 gets wrong here: dQ", stacklevel=2)
        return ours(q, k, v)

    with pytest.raises(UserWarning, match="gets wrong here"):
        peers.checked((handed_on, tensors()), ours)


def test_natten_is_called_as_its_users_call_it(monkeypatch):
    given = {}

    def na2d(q, k, v, **arguments):
        given.update(arguments)
        return ours(*(t.flatten(1, 2) for t in (q, k, v))).unflatten(1, GRID.grid)

    package = SimpleNamespace(
        HAS_LIBNATTEN=True,
        na2d=na2d,
        get_configs_for_cutlass_hopper_fna=lambda *_: [(((16, 8), (16, 8)), schedule) for schedule in ("slow", "fast")],
        get_bwd_configs_for_cutlass_hopper_fna=lambda *_: [((8, 8), (16, 8)), ((8, 8), (8, 16))],
    )
    # Three times of each forward, then of each backward with the fastest forward.
    times = iter([5, 3, 4, 2, 9, 9, 1, 1, 1, 2, 2, 2])
    monkeypatch.setattr(peers, "_milliseconds", lambda run, inputs: next(times))
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setattr(peers, "verdict", lambda *_: Support(True, ""))
    contender = peers.peer("natten", PATTERN, GRID, tensors())
    assert peers.checked(contender, ours) is contender
    assert given == {
        **{"kernel_size": (5, 5), "stride": (2, 2), "dilation": (1, 1), "is_causal": (False, False)},
        **{"q_tile_shape": (16, 8), "kv_tile_shape": (16, 8), "kernel_schedule": "fast"},
        **{"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (16, 8)},
    }
    with pytest.raises(ValueError, match="beside the grid"):
        peers.peer("natten", PATTERN, Layout((8, 8), prefix=3), tensors())
    package.HAS_LIBNATTEN = False
    with pytest.raises(ValueError, match="without its CUDA kernels"):
        peers.peer("natten", PATTERN, GRID, tensors())


def test_what_a_peer_does_not_run_is_said():
    with pytest.raises(ValueError, match="flash-attn-4"):
        peers.peer("fa4", PATTERN, GRID, tensors())
    with pytest.raises(ValueError, match="routing"):
        peers.peer("flex", "routing(regions=4x4,topk=2)", GRID, tensors())
