"""The names of variables that ask for a pattern; it imports nothing, as plug-ins read it where nobody asks."""

from __future__ import annotations

import os
from collections.abc import Mapping

# A pattern; or a file of one for each layer, as `visattn.apply` reads it.
PATTERN, CONFIG = "VISATTN_PATTERN", "VISATTN_CONFIG"
# How many of the first steps stay dense; "auto" or a backend; whether a layer that cannot run its pattern raises.
DENSE_STEPS, BACKEND, STRICT = "VISATTN_DENSE_STEPS", "VISATTN_BACKEND", "VISATTN_STRICT"


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for a pattern at all."""
    return bool(environment.get(PATTERN) or environment.get(CONFIG))
