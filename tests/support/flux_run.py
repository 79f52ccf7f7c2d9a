"""A model of FLUX.1's 57 blocks, with few channels and random weights, and the report of a schedule on it.

`python -m tests.support.flux_run`
"""

import diffusers
import torch

import visattn
from tests.support.tiny_flux import flux_inputs

SIDE, TEXT = 32, 77


@torch.no_grad()
def main():
    """Entry point."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = flux_inputs(SIDE, SIDE, TEXT, batch=1)
    with visattn.apply(model, {"0-3": "dense", "4-": "na(window=9x9)"}) as handle:
        for _ in range(2):
            model(**inputs)
        # What cannot be: a block whose attention is called with a mask of pairs.
        own = model.single_transformer_blocks[9].attn
        mask = torch.ones(SIDE**2 + TEXT, SIDE**2 + TEXT, dtype=torch.bool).tril()
        pre = own.register_forward_pre_hook(
            lambda module, args, given: (args, {**given, "attention_mask": mask[None, None]}), with_kwargs=True
        )
        model(**inputs)
        pre.remove()
        print(handle.report())


if __name__ == "__main__":
    main()
