"""Plans cut in chunks for engines of plain operators: how large they are, and that it changes nothing."""

from types import SimpleNamespace

import pytest
import torch

from visattn import Layout, attention, parse
from visattn.kernels import plan_chunks


@pytest.mark.parametrize(("gib", "power"), [(1, 22), (4, 22), (8, 23), (24, None), (80, 26), (141, 26)])
def test_a_gpu_takes_larger_chunks_as_far_as_its_memory_goes(gib, power, monkeypatch):
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert plan_chunks.products(torch.device("cuda", 0)) == (gib * 2**20 if power is None else 2**power)
    assert plan_chunks.products(torch.device("cpu")) == 2**22


@pytest.mark.parametrize("text", ["sigmoid(sparse=na(window=5x5))", "sparselinear(sparse=na(window=4x4,stride=2x2))"])
def test_the_size_of_chunks_changes_nothing(text, monkeypatch):
    layout = Layout((12, 9), prefix=3)
    q, k, v = torch.randn(3, 2, layout.length, 2, 16, dtype=torch.float64).unbind(0)
    own, numbers = parse(text).initial_parameters(2, 16, layout.grid), []
    options = {"parameters": {name: value.double() for name, value in own.items()}} if own else {}
    whole = attention(q, k, v, text, layout, **options)
    cut = plan_chunks.chunks

    def counted(*given, **more):
        found = list(cut(*given, **more))
        numbers.append(len(found))
        return iter(found)

    monkeypatch.setattr(plan_chunks, "chunks", counted)
    monkeypatch.setattr(plan_chunks, "PRODUCTS", 1)
    torch.testing.assert_close(attention(q, k, v, text, layout, **options), whole, rtol=1e-12, atol=1e-12)
    assert numbers and min(numbers) > 1
