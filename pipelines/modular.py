"""A block of diffusers' modular pipelines that makes the pattern an input of the call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from visattn.handle import apply


class SparseAttentionStep(SequentialPipelineBlocks):
    """Runs a block with patterns in the attention of its models, and without them afterwards, whatever happens in it.

    The call takes `attention_pattern` (a pattern's text, a mapping of layers, or a file; None for stock attention),
    `attention_dense_steps` and `attention_always`, and gives `attention_report`.

    Attributes:
        attention_pattern: What a call runs that names no pattern.
        attention_dense_steps: How many first steps stay dense in a call that does not say it.
        attention_always: Whether the pattern runs also where dense attention is estimated to be faster, likewise.
    """

    attention_pattern: Any = None
    attention_dense_steps: int | float = 0
    attention_always: bool = False

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Denoises with a pattern in the self-attention of the models, see visattn.apply."

    @property
    def inputs(self) -> list[Any]:
        """Those of the block inside, and what the pattern is."""
        return [
            InputParam(
                "attention_pattern",
                default=self.attention_pattern,
                description="A pattern, like 'na(window=9x9)'; None for none.",
            ),
            InputParam(
                "attention_dense_steps",
                default=self.attention_dense_steps,
                description="First steps that stay dense: count or share.",
            ),
            InputParam(
                "attention_always",
                default=self.attention_always,
                description="Whether the pattern runs also where dense attention is estimated to be faster.",
            ),
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
            always = bool(state.get("attention_always"))
            with apply(components, pattern, dense_steps=steps, always=always) as handle:
                components, state = super().__call__(components, state)
                report = handle.report()
        state.set("attention_report", report)
        return components, state

    def save(self, folder: str | Path) -> None:
        """Write the workflow, its pattern with it, for `ModularPipelineBlocks.from_pretrained(folder, ...)`.

        Args:
            folder: Where to; it gets a configuration and a file of code, so loading needs `trust_remote_code=True`.

        Raises:
            ValueError: If the block inside is not one of diffusers', which a file could import and make again.
        """
        inner = next(iter(self.sub_blocks.values()))
        kind = type(inner)
        if not kind.__module__.startswith("diffusers.") or dict(inner.sub_blocks).keys() != kind().sub_blocks.keys():
            raise ValueError(f"{kind.__name__} is no block as diffusers has it, so that a file could not name it")
        plain = isinstance(self.attention_pattern, str | dict | None)
        if not plain:
            raise ValueError(f"attention_pattern={self.attention_pattern!r} is not saved: give its text")
        self.save_pretrained(str(folder))
        # Under this name diffusers looks for the code of the class.
        (Path(folder) / f"{__name__.rpartition('.')[2]}.py").write_text(
            f"from {kind.__module__} import {kind.__name__}\n"
            "from visattn.pipelines.modular import SparseAttentionStep as Base\n\n\n"
            f"class {type(self).__name__}(Base):\n"
            f"    block_classes = [{kind.__name__}]\n"
            '    block_names = ["denoise"]\n'
            f"    attention_pattern = {self.attention_pattern!r}\n"
            f"    attention_dense_steps = {self.attention_dense_steps!r}\n"
            f"    attention_always = {self.attention_always!r}\n",
            encoding="utf-8",
        )


def sparse_attention(
    block: ModularPipelineBlocks, pattern: Any = None, dense_steps: int | float = 0, always: bool = False
) -> SparseAttentionStep:
    """A block, like the denoising one of a pipeline's, that takes a pattern as an input of the call.

    Args:
        block: The block around the denoising loop; it is not changed.
        pattern: What a call runs that names no pattern; `save` keeps it.
        dense_steps: How many first steps stay dense in a call that does not say it.
        always: Whether the pattern runs also where dense attention is estimated to be faster, likewise.

    Returns:
        What to put into its place.
    """
    made = SparseAttentionStep()
    made.block_classes, made.block_names = [type(block)], ["denoise"]
    made.sub_blocks["denoise"] = block
    made.attention_pattern, made.attention_dense_steps, made.attention_always = pattern, dense_steps, always
    return made
