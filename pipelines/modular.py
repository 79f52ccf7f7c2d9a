"""A block of diffusers' modular pipelines that makes the pattern an input of the call."""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from visattn.handle import apply


class SparseAttentionStep(SequentialPipelineBlocks):
    """Runs a block with patterns in the attention of its models, and without them afterwards, whatever happens in it.

    The call takes `attention_pattern` (a pattern's text, a mapping of layers, or a file; None for stock attention) and
    `attention_dense_steps`, and gives `attention_report`.
    """

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Denoises with a pattern in the self-attention of the models, see visattn.apply."

    @property
    def inputs(self) -> list[Any]:
        """Those of the block inside, and what the pattern is."""
        return [
            InputParam(
                "attention_pattern", default=None, description="A pattern, like 'na(window=9x9)'; None for none."
            ),
            InputParam("attention_dense_steps", default=0, description="First steps that stay dense: count or share."),
            *super().inputs,
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        """Those of the block inside, and the report."""
        return [*super().intermediate_outputs, OutputParam("attention_report", description="What the pattern did.")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Run the block."""
        pattern, report = state.get("attention_pattern"), None
        if pattern is None:
            components, state = super().__call__(components, state)
        else:
            steps: Any = state.get("attention_dense_steps") or 0
            with apply(components, pattern, dense_steps=steps) as handle:
                components, state = super().__call__(components, state)
                report = handle.report()
        state.set("attention_report", report)
        return components, state


def sparse_attention(block: ModularPipelineBlocks) -> SparseAttentionStep:
    """A block, like the denoising one of a pipeline's, that takes a pattern as an input of the call.

    Args:
        block: The block around the denoising loop; it is not changed.

    Returns:
        What to put into its place.
    """
    made = SparseAttentionStep()
    made.block_classes, made.block_names = [type(block)], ["denoise"]
    made.sub_blocks["denoise"] = block
    return made
