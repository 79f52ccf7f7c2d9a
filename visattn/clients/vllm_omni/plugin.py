"""The general plug-in of vLLM-Omni: it calls `register` once in every process."""

from __future__ import annotations

import warnings

NAME = "VISATTN"
BACKEND = "visattn.clients.vllm_omni.backend.VisattnBackend"
TESTED = "0.30.0"
# What tells its attention where the tokens of the video are.
MODELS = ("Wan 2.1 and 2.2", "Wan VACE", "MiniMax-H3")


def register() -> None:
    """Add the backend to those that vLLM-Omni can be asked for; a second call does nothing.

    It never raises: visattn may be installed beside a vLLM-Omni that nobody asks for patterns.
    """
    try:
        from aenum import extend_enum  # pyright: ignore[reportMissingImports]
        from vllm_omni.diffusion.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
            DiffusionAttentionBackendEnum,
        )

        if NAME not in DiffusionAttentionBackendEnum.__members__:
            extend_enum(DiffusionAttentionBackendEnum, NAME, BACKEND)
    except Exception as error:  # whatever another version raises
        warnings.warn(
            f"vLLM-Omni has no backend {NAME}, as its list of backends is not that of {TESTED}, which visattn is "
            f"tested with: {error}",
            stacklevel=2,
        )
