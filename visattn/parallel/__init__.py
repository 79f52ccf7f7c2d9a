"""Attention of one sequence on several devices: the grid is cut in slabs, and devices exchange what patterns need.

    slabs = Slabs.even(layout, ranks=2, axis=0)
    out = halo_attention(slabs.shard(q, rank), slabs.shard(k, rank), slabs.shard(v, rank), "na(window=5x5x5)", slabs)

Everything runs on torch.distributed: the process group decides the transport.
"""

from visattn.parallel.halo import halo_attention
from visattn.parallel.moved import Moved
from visattn.parallel.needs import halo_needs, refusal
from visattn.parallel.processes import together
from visattn.parallel.slabs import Slabs, best_axis
from visattn.parallel.ulysses import ulysses_attention

__all__ = ["Moved", "Slabs", "best_axis", "halo_attention", "halo_needs", "refusal", "together", "ulysses_attention"]
