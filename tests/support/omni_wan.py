"""A tiny Wan of vLLM-Omni itself with the backend "VISATTN" against its own layers with a mask.

`python -m tests.support.omni_wan FOLDER` prints a line of JSON, then what its report says; FOLDER has the packages.
"""

import contextlib
import json
import os
import sys

PATTERN = "na(window=3x5x5)"
GRID = (3, 8, 10)
SETTINGS = {"VISATTN_PATTERN": PATTERN, "VISATTN_BACKEND": "tiles", "VISATTN_DENSE_STEPS": "1", "VISATTN_STRICT": "1"}
GROUP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def started():
    """The client, with the groups of one process that its models ask for."""
    from tests.support.omni_real import Real

    client = Real()
    from vllm_omni.diffusion.distributed import parallel_state

    parallel_state.init_distributed_environment(1, 0, "env://", 0, backend="gloo")
    parallel_state.initialize_model_parallel(1, backend="gloo")
    return client


def built(client):
    """Its transformer with random weights."""
    import torch
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 64}
    with client.building("VISATTN"):
        model = WanTransformer3DModel(in_channels=16, out_channels=16, text_dim=32, freq_dim=32, **sizes).eval()
    torch.manual_seed(0)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.15)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return model


@contextlib.contextmanager
def replaced(model, mask):
    """Its self-attention by torch with a mask, None for none."""
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q, k, v, metadata=None):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    layers = [block.attn1.attn for block in model.blocks]
    for layer in layers:
        layer.forward = attend
    yield
    for layer in layers:
        del layer.forward


def compared():
    """What the runs of a model say, and its report."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config

    import visattn
    from visattn import Layout
    from visattn.clients.vllm_omni.plugin import register
    from visattn.served.run import reports

    register()
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        client = started()
        model = built(client)
        torch.manual_seed(1)
        given = torch.randn(1, 16, 3, 16, 20), torch.tensor([500]), torch.randn(1, 7, 32)

        def run(step):
            with client.step(step, 4):
                return model(*given).sample

        dense, sparse = run(0), run(1)
        with replaced(model, None):
            stock = run(1)
        with replaced(model, visattn.dense_mask(visattn.parse(PATTERN), Layout(GRID))):
            masked = run(1)
    (report,) = reports().values()
    most = masked.abs().max()
    row = {
        "hits": report.hits,
        "dense": report.dense,
        "dense_off": _off(dense, stock, most),
        "off": _off(sparse, masked, most),
        "change": _off(masked, stock, most),
    }
    return row, str(report)


def _off(found, wanted, most):
    return float(f"{float((found - wanted).abs().max() / most):.1e}")


def main():
    """Entry point."""
    sys.path.append(sys.argv[1])
    os.environ.update({**SETTINGS, **GROUP, "VLLM_LOGGING_LEVEL": "ERROR"})
    with contextlib.redirect_stdout(sys.stderr):
        row, report = compared()
    print(json.dumps(row))
    print(report)


if __name__ == "__main__":
    main()
