"""torch's attention in parts, where a launch has no room for all samples."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.kernels import fused as module
from visattn.kernels.fused import fused


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("mask", [None, (7, 1, 1, 5), (1, 2, 4, 5), (4, 5), (7, 2, 4, 5)])
@pytest.mark.parametrize("keys", [7, 1])
def test_parts_are_the_whole(monkeypatch, mask, keys):
    monkeypatch.setattr(module, "MOST", 3)
    sizes = []

    def seen(q, *given, **options):
        sizes.append(len(q))
        return scaled_dot_product_attention(q.as_subclass(torch.Tensor), *given, **options)

    monkeypatch.setattr(module, "scaled_dot_product_attention", seen)
    q = torch.randn(7, 2, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, keys, 2, 5, 8, dtype=torch.float64)
    given = None if mask is None else torch.randn(mask, dtype=torch.float64)
    whole = scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.5)
    parts = fused(q.as_subclass(OnGpu), k, v, given, scale=0.5)
    torch.testing.assert_close(parts.as_subclass(torch.Tensor), whole)
    assert sizes == [3, 3, 1]
    # What fits is one call.
    fused(q[:3].as_subclass(OnGpu), k[:3], v[:3], scale=0.5)
    fused(q, k, v, scale=0.5)
    assert sizes[3:] == [3, 7]
