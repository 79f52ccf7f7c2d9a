"""Context parallelism on two processes: Ulysses equals one process, the rest is refused."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from tests.support import context_parallel

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="this diffusers has no parallelism"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
]


def test_ulysses_equals_one_process_and_ring_is_refused(tmp_path):
    torch.multiprocessing.spawn(context_parallel.work, (2, str(tmp_path)), nprocs=2)
    alone = context_parallel.outputs(lambda model: None)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, (out, hits) in alone.items():
            torch.testing.assert_close(found[name][0], out, rtol=1e-5, atol=1e-6)
            assert found[name][1] == hits
        torch.testing.assert_close(found["later"][0], alone["wan"][0], rtol=1e-5, atol=1e-6)
        assert torch.equal(found["dense step"][0], torch.zeros_like(found["dense step"][0]))
        assert found["dense step"][1] == 2
        assert "ring context parallelism (ring_degree=2) shows a device the keys piece by piece" in found["ring"]
        assert "ulysses_anything=True splits tokens and heads unevenly" in found["anything"]
