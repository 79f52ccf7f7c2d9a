"""The self-attention of a tiny Wan that SGLang itself builds, with its plug-in, against masked dense attention.

`python -m tests.support.sglang_wan FOLDER ...` prints a line of JSON, and then what the report says; the folders have
SGLang and what it imports. Its models run kernels that need a GPU; their attention layers do not.
"""

import contextlib
import json
import os
import sys

PATTERN = "na(window=3x5x5)"
GRID = (3, 8, 10)
LATENTS = (1, 16, 3, 16, 20)
SETTINGS = {"VISATTN_PATTERN": PATTERN, "VISATTN_BACKEND": "tiles", "VISATTN_DENSE_STEPS": "1", "VISATTN_STRICT": "1"}
GROUP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


class Arguments:
    """Those of a server, of which a model of one process asks for few."""

    attention_backend = None

    def __init__(self, dit):
        self.pipeline_config = type("Pipeline", (), {"dit_config": dit})()

    def __getattr__(self, name):
        return 1 if name.endswith(("degree", "size")) else None


def built():
    """Its transformer, after its plug-ins and their hooks are in place."""
    from sglang.multimodal_gen.runtime.platforms import plugins

    from visattn.clients.sglang.plugin import register

    # As the entry point does, which a checkout that is not installed has not.
    register()
    plugins.apply_plugin_hooks()
    from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig
    from sglang.multimodal_gen.runtime import server_args
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    parallel_state.init_distributed_environment(1, 0, "env://", 0)
    parallel_state.initialize_model_parallel(sequence_parallel_degree=1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 64}
    arch = WanVideoArchConfig(in_channels=16, out_channels=16, text_dim=32, freq_dim=32, **sizes)
    config = WanVideoConfig(arch_config=arch)
    server_args.set_global_server_args(Arguments(config))
    from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel

    return WanTransformer3DModel(config, hf_config={})


def compared():
    """What two steps of a model's self-attention layers say, and their report."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import visattn
    from visattn import Layout

    layers = [block.attn1 for block in built().blocks]
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    batch = type("Batch", (), {"raw_latent_shape": LATENTS, "num_inference_steps": 4})()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 240, 2, 24) for _ in range(3))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    masks = [None, visattn.dense_mask(visattn.parse(PATTERN), Layout(GRID))]
    wanted = [scaled_dot_product_attention(*heads, mask).transpose(1, 2) for mask in masks]
    off = [0.0, 0.0]
    with torch.no_grad():
        for step in range(2):
            with set_forward_context(step, None, batch):
                for layer in layers:
                    off[step] = max(off[step], float((layer(q, k, v) - wanted[step]).abs().max()))
    report = layers[0].attn_impl.layer.run.report()
    change = float((wanted[1] - wanted[0]).abs().max())
    shown = {"dense_off": off[0], "off": off[1], "change": change}
    row = {"hits": report.hits, "dense": report.dense, **{name: float(f"{x:.1e}") for name, x in shown.items()}}
    return row, str(report)


def main():
    """Entry point."""
    sys.path.extend(sys.argv[1:])
    os.environ.update({**SETTINGS, **GROUP})
    with contextlib.redirect_stdout(sys.stderr):
        row, report = compared()
    print(json.dumps(row))
    print(report)


if __name__ == "__main__":
    main()
