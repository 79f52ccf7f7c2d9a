"""The kernel whose loop passes over blocks: output, log-sum-exp and counts are those of lists without them."""

import pytest
import torch

from visattn import Layout, attention
from visattn.kernels.triton.choosing import skipped
from visattn.patterns.choice.listening import listening

CASES = {
    "text, grouped heads": ("topk(keep=1.0,block=1x2,skip=0.5,always=none)", Layout((4, 4), 3, 2), 2, 1, False),
    "short blocks, counts, shared": ("topp(p=0.8,block=2x3,skip=0.3,share=2)", Layout((3, 4), 20), 2, 2, True),
    "runs": ("topk(keep=0.7,block=16,key_block=8,skip=0.2)", Layout(44), 1, 1, True),
}


def results(q, k, v, text, layout, backend, **options):
    """Output, log-sum-exp, and shares of pairs that were met and passed over."""
    met, over = [], []
    with listening(met.append, over.append):
        found = attention(q, k, v, text, layout, backend=backend, return_lse=True, **options)
    return *found, met[-1], over[-1]


@pytest.mark.parametrize("name", CASES)
def test_passes_over_what_the_rule_passes_over(name, monkeypatch):
    text, layout, heads, kv_heads, masked = CASES[name]
    made, batch = torch.Generator().manual_seed(0), 2 if masked else 1
    q = 3 * torch.randn(batch, layout.length, heads, 24, generator=made)
    k, v = (torch.randn(batch, layout.length, kv_heads, 24, generator=made) for _ in range(2))
    options = {"scale": 0.4}
    if masked:
        mask = torch.rand(2, layout.length, generator=made) > 0.4
        mask[1, layout.length // 2 :] = False
        options = {"scale": -0.3, "key_mask": mask}
    want = results(q, k, v, text, layout, "reference", **options)
    assert want[3].mean() > 0.01
    # The kernel has the test: nobody makes it on lists.
    monkeypatch.setattr("visattn.patterns.dynamic.not_skipped", None)
    found = results(q, k, v, text, layout, "triton", **options)
    assert torch.equal(found[1].isinf(), want[1].isinf())
    for one, other in zip(found, want, strict=True):
        assert (one - other).nan_to_num(posinf=0, neginf=0).abs().max() < 2e-5


def test_values_of_what_is_passed_over_are_not_read():
    layout, text = Layout(64), "topk(keep=1.0,block=16,skip=0.5,always=none)"
    q, k = torch.ones(1, 64, 1, 16), torch.zeros(1, 64, 1, 16)
    k[:, :16] = 1.0
    v = torch.randn(1, 64, 1, 16)
    v[:, 16:] = float("nan")
    out = attention(q, k, v, text, layout, backend="triton")
    assert (out - v[:, :16].mean(1)).abs().max() < 1e-5


def test_what_the_kernel_cannot_hold_goes_by_lists(monkeypatch):
    layout = Layout((16, 16))
    q, k, v = torch.randn(3, 1, 256, 1, 16, generator=torch.manual_seed(0)).unbind(0)
    text = "topk(keep=1.0,block=16x16,key_block=4x4,skip=0.3,always=none)"
    want = attention(q, k, v, text, layout, backend="reference")
    monkeypatch.setattr(skipped, "attend_or_skip", None)
    assert (attention(q, k, v, text, layout, backend="triton") - want).abs().max() < 1e-5
    # A gradient of values alone is that of the lists.
    v.requires_grad_()
    text = "topk(keep=1.0,block=4x4,skip=0.3,always=none)"
    found, want = (
        torch.autograd.grad(attention(q, k, v, text, layout, backend=b).square().sum(), v)[0]
        for b in ("triton", "reference")
    )
    assert (found - want).abs().max() < 1e-4
