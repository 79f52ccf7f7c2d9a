import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visattn.operands import repeated, wants_gradient, wide_dtype, widened


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, None), (torch.float64, None)],
)
def test_sums_are_in_float32_at_least(dtype, wide):
    x = torch.ones(2, dtype=dtype)
    assert wide_dtype(x) == widened(x).dtype == (wide or dtype)
    assert (widened(x) is x) == (wide is None)


@pytest.mark.parametrize("dim", [1, 2])
def test_query_heads_that_share_a_key_head_are_neighbours(dim):
    x = torch.arange(24.0).reshape(2, 3, 2, 2).movedim(2, dim)
    found = repeated(x, 6, dim)
    assert all(torch.equal(found.select(dim, head), x.select(dim, head // 3)) for head in range(6))
    assert repeated(x, 2, dim) is x


def test_repeating_copies_no_number_to_the_device():
    """What does could not be captured in a CUDA graph."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Seen():
        repeated(torch.ones(1, 2, 2, 4), 4)
    assert set(seen) - {"ones"} <= {"unsqueeze", "expand", "clone", "view", "_unsafe_view"}


def test_who_wants_a_gradient():
    x = torch.ones(1)
    assert not wants_gradient() and not wants_gradient(x, None)
    assert wants_gradient(x, None, torch.ones(1, requires_grad=True))
    with torch.no_grad():
        assert not wants_gradient(torch.ones(1, requires_grad=True))
