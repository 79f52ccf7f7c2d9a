"""What heads look at: locality, entropy, what patterns catch, rollout, rows and importance, without S x S.

Everything is computed from recorded calls (`calls`, or a file of `visattn record`) by further calls of `attention` with
other values, so that memory grows with S and not with its square.
"""

from __future__ import annotations

from visattn.maps.gather import calls
from visattn.maps.importance import Pruned, gradient, pruning
from visattn.maps.measures import Spread, caught, received, spread
from visattn.maps.overview import Overview, Site
from visattn.maps.rollout import rollout
from visattn.maps.rows import Rows, offsets, rows
from visattn.maps.scores import average_drop, confidence_gain, top_share
from visattn.maps.summary import overview

__all__ = [
    "Overview",
    "Pruned",
    "Rows",
    "Site",
    "Spread",
    "average_drop",
    "calls",
    "caught",
    "confidence_gain",
    "gradient",
    "offsets",
    "overview",
    "pruning",
    "received",
    "rollout",
    "rows",
    "spread",
    "top_share",
]
