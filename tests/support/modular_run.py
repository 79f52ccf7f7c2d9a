"""A modular pipeline of diffusers whose denoising block takes a pattern: a tiny FLUX with random weights.

`python -m tests.support.modular_run` prints what a call without a pattern and one with a pattern report.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep

from tests.support.tiny import noise, seeded
from tests.support.tiny_flux import flux
from visattn.pipelines.modular import sparse_attention


def pipeline():
    """The pipeline."""
    model = flux()[0]
    kind = type(model)
    model = seeded(kind, **{**dict(model.config), "in_channels": 16})
    made = sparse_attention(FluxCoreDenoiseStep()).init_pipeline()
    made.update_components(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler())
    return made


def run(pipeline, **more):
    """A call of three steps."""
    given = {"prompt_embeds": noise(1, 5, 32), "pooled_prompt_embeds": noise(1, 32), "num_inference_steps": 3}
    sizes = {"height": 96, "width": 128, "generator": torch.Generator().manual_seed(0), "guidance_scale": 1.0}
    return pipeline(**given, **sizes, **more)


@torch.no_grad()
def main():
    """Entry point."""
    pipe = pipeline()
    # Its 48 tokens are too few for a pattern to be faster.
    asked = {"attention_pattern": "na(window=3x3)", "attention_dense_steps": 1, "attention_always": True}
    stock, sparse, again = run(pipe), run(pipe, **asked), run(pipe)
    print("without a pattern:", stock.get("attention_report"))
    print(*(f"{name}={value!r}" for name, value in asked.items()))
    for line in str(sparse.get("attention_report")).splitlines():
        # Why each other backend is not taken is left away.
        print(line.split(" (cheapest")[0])
    same = torch.equal(stock.get("latents"), again.get("latents"))
    print("the latents of a call without one, before and after, are equal to the bit:", same)


if __name__ == "__main__":
    main()
