"""Choices in what is traced, exported or mapped: made anew for each q and k."""

import pytest
import torch

from tests.support.cases import qkv
from visattn import attention
from visattn.layout import Layout


@pytest.mark.parametrize("text", ["topk(keep=0.3", "topp(p=0.6, score=parts(2x2)", "above(tau=0.5, rest=mean"])
def test_traced_and_mapped_calls_choose_anew(text):
    """What is written down for other programs chooses from the q and k that it gets, of any batch; so does vmap."""
    layout = Layout((8, 8), 2)

    def run(q, k, v):
        return attention(q, k, v, f"{text}, block=2x2)", layout)

    q, k, v = qkv(layout, 4, dim=8, batch=2, dtype=torch.float32)
    traced = torch.jit.trace(run, (q, k, v), check_trace=False)
    other = qkv(layout, 4, dim=8, batch=3, dtype=torch.float32, seed=5)
    assert (traced(*other) - run(*other)).abs().max() < 1e-5
    mapped = torch.func.vmap(lambda q, k, v: run(q[None], k[None], v[None])[0])(q, k, v)
    assert (mapped - run(q, k, v)).abs().max() < 1e-5
