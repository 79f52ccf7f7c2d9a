"""The nodes of ComfyUI; imported by it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    from comfy_api.latest import ComfyExtension, io, ui  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "the nodes of visattn need ComfyUI 0.3.64 or newer, whose comfy_api.latest has ComfyExtension, io and ui: "
        f"{error}"
    ) from error

import visattn
from visattn.clients.comfy.patch import patch, run_of
from visattn.clients.comfy.picture import picture

CATEGORY = "model/patch"


class SparseAttention(io.ComfyNode):
    """A model with a pattern in its self-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node takes and gives."""
        return io.Schema(
            node_id="VisattnSparseAttention",
            display_name="Sparse Attention (visattn)",
            category=CATEGORY,
            description="Each token attends to a window around it, or what the pattern says; text stays global.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("pattern", default="na(window=33x33)", tooltip="As of `visattn patterns`."),
                io.Float.Input("start_percent", default=0.2, min=0.0, max=1.0, step=0.01),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01),
                io.String.Input("layers", default="", tooltip="Like 4-9; empty for all."),
                io.Int.Input("min_tokens", default=1024, min=0, max=1 << 24),
                io.Combo.Input("backend", options=["auto", *visattn.backends()]),
                io.Boolean.Input("strict", default=False, tooltip="Raise if a selected layer cannot run the pattern."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, pattern: str) -> bool | str:
        """True, or what is wrong with the pattern, which the node shows before anything runs."""
        return _wrong(pattern)

    @classmethod
    def execute(cls, model: Any, pattern: str, layers: str, **options: Any) -> io.NodeOutput:
        """Patch a clone of the model."""
        return io.NodeOutput(patch(model, pattern, layers=layers.strip() or None, **options))


class TunedAttention(io.ComfyNode):
    """A model with the patterns of a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node takes and gives."""
        return io.Schema(
            node_id="VisattnTunedAttention",
            display_name="Tuned Attention",
            category=CATEGORY,
            description="The pattern of each layer from a file like {'0-3': 'dense', '4-': 'na(window=9x9)'}.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("file", default=""),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        """True, or what is wrong with the file."""
        return (
            True if Path(file).is_file() else f"pattern file {file!r} does not exist: `visattn tune` writes such files"
        )

    @classmethod
    def execute(cls, model: Any, file: str, start_percent: float) -> io.NodeOutput:
        """Patch a clone of the model."""
        return io.NodeOutput(patch(model, Path(file), start_percent=start_percent))


class AttentionReport(io.ComfyNode):
    """What a patched model did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node takes and gives; the latent goes through, so that the sampling is before it."""
        return io.Schema(
            node_id="VisattnAttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), io.Latent.Input("latent")],
            outputs=[
                io.Latent.Output(),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="picture"),
            ],
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> io.NodeOutput:
        """The report as text, and as a picture of what ran most often."""
        run = run_of(model)
        report = None if run is None else run.report()
        text = "this model has no Sparse Attention (visattn)" if report is None else str(report)
        return io.NodeOutput(latent, text, picture(text, report), ui=ui.PreviewText(text))


def _wrong(pattern: str) -> bool | str:
    try:
        visattn.parse(pattern)
    except ValueError as error:
        return str(error)
    return True


class Extension(ComfyExtension):
    """The nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All of them."""
        return [SparseAttention, TunedAttention, AttentionReport]


async def comfy_entrypoint() -> Extension:
    """What ComfyUI calls."""
    return Extension()
