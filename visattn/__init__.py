"""visattn: one call makes vision and diffusion models fast by changing their attention.

The public names resolve on first use (PEP 562), so `import visattn` and the command line do not wait
for torch, diffusers or timm until they need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from visattn.discovery import install as _install
from visattn.version import __version__

if TYPE_CHECKING:
    from visattn import maps, patterns
    from visattn.attend import attention, backends, explain
    from visattn.chosen import tile_choice
    from visattn.clients.transformers.named import register
    from visattn.doors import (
        plugins,
        register_adapter,
        register_attention,
        register_backend,
        register_family,
        register_pattern,
    )
    from visattn.handle import Handle, apply
    from visattn.heads.convert import HeadConversion, convert_heads
    from visattn.keep import clear_caches
    from visattn.kernels.rows import attention_rows
    from visattn.layout import Layout
    from visattn.patterns import dense_mask, parse
    from visattn.pipelines.guidance.handle import guide
    from visattn.plans import TilePlan, plan

__all__ = [
    "Handle",
    "HeadConversion",
    "Layout",
    "TilePlan",
    "__version__",
    "apply",
    "attention",
    "attention_rows",
    "backends",
    "clear_caches",
    "convert_heads",
    "dense_mask",
    "explain",
    "guide",
    "maps",
    "parse",
    "patterns",
    "plan",
    "plugins",
    "register",
    "register_adapter",
    "register_attention",
    "register_backend",
    "register_family",
    "register_pattern",
    "tile_choice",
]


_install()


def __getattr__(name: str) -> Any:
    """Resolve a public name from the module that defines it, on first use."""
    # No submodule carries the name of a public function: importing it would replace the function here.
    homes = {
        "Handle": "visattn.handle",
        "HeadConversion": "visattn.heads.convert",
        "Layout": "visattn.layout",
        "TilePlan": "visattn.plans",
        "apply": "visattn.handle",
        "attention": "visattn.attend",
        "attention_rows": "visattn.kernels.rows",
        "backends": "visattn.attend",
        "clear_caches": "visattn.keep",
        "convert_heads": "visattn.heads.convert",
        "dense_mask": "visattn.patterns",
        "explain": "visattn.attend",
        "guide": "visattn.pipelines.guidance.handle",
        "parse": "visattn.patterns",
        "plan": "visattn.plans",
        "plugins": "visattn.doors",
        "register": "visattn.clients.transformers.named",
        "register_adapter": "visattn.doors",
        "register_attention": "visattn.doors",
        "register_backend": "visattn.doors",
        "register_family": "visattn.doors",
        "register_pattern": "visattn.doors",
        "tile_choice": "visattn.chosen",
    }
    if name in ("maps", "patterns"):
        return importlib.import_module(f"visattn.{name}")
    if name not in homes:
        raise AttributeError(f"module 'visattn' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(homes[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
